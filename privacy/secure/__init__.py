"""Secure aggregation: the server learns sums over groups of sites, and no site's update."""
