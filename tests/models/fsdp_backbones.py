"""Every backbone gives the same predictions and gradients when its parameters are sharded over two processes."""

import os

from torch import distributed, nn
from torch.distributed.fsdp import fully_shard

from ldm_smd.training.sharding import full_tensor, is_sharded
from tests.models.backbones import BACKBONES, inputs, mixture, perturbed
from tests.rounding import nearly_equal

distributed.init_process_group("gloo")
mesh = distributed.device_mesh.init_device_mesh("cpu", (2,))
for name in BACKBONES:
    x, t, labels, eta = inputs(draws=3)
    model = perturbed(mixture(name))
    expected = model(x, t, labels, eta).sample
    expected.square().mean().backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}

    model = perturbed(mixture(name))
    for convolution in [module for module in model.modules() if isinstance(module, nn.Conv2d)]:
        fully_shard(convolution, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert is_sharded(model)
    found = model(x, t, labels, eta).sample
    assert nearly_equal(found, expected), name
    found.square().mean().backward()
    for key, parameter in model.named_parameters():
        assert nearly_equal(full_tensor(parameter.grad), gradients[key]), (name, key)
distributed.barrier()  # otherwise one process may exit while the other still waits for it
os._exit(0)  # a normal exit may abort, because a thread of gloo may still be running
