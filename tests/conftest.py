"""Eight virtual CPU devices for the whole suite, whatever the machine has."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Most of the suite's time is spent compiling programs that run once: LLVM need not polish them.
os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
# Lines are folded to the terminal's width, which differs from machine to machine.
os.environ["COLUMNS"] = "100"

from hypothesis import settings

settings.register_profile("jaxft", database=None, deadline=None, derandomize=True)
settings.load_profile("jaxft")
