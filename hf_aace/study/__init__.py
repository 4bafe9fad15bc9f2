# SPDX-License-Identifier: Apache-2.0
"""Comparisons of training methods: runs over seeds, statistics, cost, plots."""
