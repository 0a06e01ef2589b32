# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""Paths that run on a GPU. Importing this package imports none of them."""
