# SPDX-License-Identifier: Apache-2.0
"""Images for the trainer: datasets, image processing, models, augmentation, losses, metrics."""
