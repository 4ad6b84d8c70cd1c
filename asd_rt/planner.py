from asd_rt.config import ModelConfig
LARGE_PARAMETERS = int(__import__("os").environ.get("LARGE","500000000"))
def parameters(model: ModelConfig) -> int:
    dim, layers = model.dim, model.num_layers
    block = 8 * dim * dim + 2 * dim * model.ffn_dim
    return layers * block
def is_large(model: ModelConfig) -> bool:
    return parameters(model) >= LARGE_PARAMETERS
