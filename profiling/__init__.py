# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""The benchmark, installed as ``dsv4_router.profiling``."""
