import torch
from safetensors.torch import load_file

from ldm_smd.models.float8 import save_float8
from ldm_smd.models.unet import SMDUNet2DModel


def test_large_weights_take_eight_bits_and_are_read_as_any_others(tmp_path):
    torch.manual_seed(0)
    model = SMDUNet2DModel(
        in_channels=4, num_classes=2, block_out_channels=(32, 32), attention_head_dim=8, norm_num_groups=4, z_channels=4
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)  # some are zero
        model.down[0].blocks[0].conv2.weight *= 1e-2  # so small that float8 has too few bits
    save_float8(model, tmp_path)
    stored = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float8_e4m3fn, torch.float16}
    assert stored["down.0.blocks.0.conv1.weight"].dtype == torch.float8_e4m3fn
    assert stored["down.0.blocks.0.conv2.weight"].dtype == torch.float16
    loaded = SMDUNet2DModel.from_pretrained(tmp_path)
    for name, value in model.named_parameters():
        read = loaded.get_parameter(name)
        assert read.dtype == torch.float32 and (read - value).norm() <= 0.05 * value.norm(), name
    assert all(torch.equal(loaded.get_buffer(name), value.half().float()) for name, value in model.named_buffers())
