"""What `make bench-peers` is made of: random checkpoints in everybody's format, the contenders, the bars."""
