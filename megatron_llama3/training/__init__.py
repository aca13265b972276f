"""The optimizer step, the loop around it, and the engines that shard it over data parallelism."""
