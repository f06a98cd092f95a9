"""Training: token shards (``prepare``, ``shards``), models from recipes (``models``) and ``pretrain``."""
