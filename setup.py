from setuptools import find_packages, setup

CORE = ["torch>=2.11", "numpy", "sentencepiece", "safetensors", "tqdm"]
EXTRAS = {
    "data": ["pyarrow"],
    "hf": ["tokenizers", "huggingface_hub"],
    "track": ["tensorboard", "wandb"],
    "plot": ["matplotlib"],
    "eval": ["sacrebleu", "rouge_chinese", "jieba"],
    "bench": ["transformers", "datasketch", "peft", "trl"],
}
EXTRAS["test"] = sorted({"pytest", "pytest-xdist", "ruff", "transformers", "datasketch"}.union(*EXTRAS.values()))

setup(
    name="minillm",
    version="0.1.0",
    description="Train language models from scratch in pure PyTorch, readable from end to end.",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["minillm", "minillm.*"]),
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["minillm = minillm.cli:main"]},
)
