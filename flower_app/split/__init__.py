"""Split learning at both ends: the streams, the middle at the server, and what sites do."""
