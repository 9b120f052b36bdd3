"""A Ray cluster of two workers on this machine. It says its address, and ends with its input."""

import sys

import ray

if __name__ == "__main__":
    found = ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        object_store_memory=2**27,
    )  # fmt: skip
    print(found.address_info["address"], flush=True)
    sys.stdin.read()
    ray.shutdown()
