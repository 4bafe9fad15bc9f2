# SPDX-License-Identifier: Apache-2.0
"""Sharpness and loss landscapes of trained models, and the plots of training runs."""
