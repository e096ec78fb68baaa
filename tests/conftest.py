"""Fixtures that several test files share. Nothing here reaches beyond 127.0.0.1."""

import os

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", WANDB_MODE="offline")
os.environ.setdefault("OMP_NUM_THREADS", "1")
