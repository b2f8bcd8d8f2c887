"""Rows of each site: read, partitioned, split, and made into records."""
