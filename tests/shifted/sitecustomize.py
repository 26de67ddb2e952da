"""Changes the memory alignment of weights, for `make test-cpus`.

With this folder in PYTHONPATH, weights read by safetensors are at 32 bytes after a multiple of 64, also in processes that tests
start. On other machines, or with another file header, this may happen by itself.
"""

import safetensors


def shifted(tensor):
    import torch  # not at the top, because some processes must not import it

    if not isinstance(tensor, torch.Tensor) or tensor.device.type != "cpu":
        return tensor
    size = tensor.numel() * tensor.element_size()
    buffer = torch.empty(size + 64, dtype=torch.uint8)
    start = (32 - buffer.data_ptr()) % 64
    return buffer[start : start + size].view(tensor.dtype).view(tensor.shape).copy_(tensor)


class SafeOpen:
    """Wraps safetensors.safe_open, which cannot be subclassed."""

    def __init__(self, *arguments, **options):
        self.file = original(*arguments, **options)

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *reason):
        return self.file.__exit__(*reason)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def get_tensor(self, name):
        return shifted(self.file.get_tensor(name))

    def get_tensors(self):
        return {name: shifted(tensor) for name, tensor in self.file.get_tensors().items()}


original = safetensors.safe_open
safetensors.safe_open = SafeOpen  # safetensors.torch imports it from here
