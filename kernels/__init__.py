# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""Kernel sources, installed as ``dsv4_router.kernels``."""

if __name__ != "dsv4_router.kernels":
    raise ImportError(f"import the kernels as dsv4_router.kernels, not as {__name__!r}: install the package first")
