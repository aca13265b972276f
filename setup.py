"""`tools/` is megatron_llama3_tools in the wheel. The rest is in pyproject.toml, which can find packages or map folders, not both."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["megatron_llama3*"]), "megatron_llama3_tools", "megatron_llama3_tools.preflight"],
    package_dir={"megatron_llama3_tools": "tools"},
)
