import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="needs a torch with devices in Python"
)
def test_all_tools_and_samplers_on_one_device(
    model_folder, gaussian_folder, conditional_folder, clip, shards, vae_folder, pictures, tmp_path
):
    """Where there is no GPU, one that is pretended: tensors left on the CPU are found as on a real one."""
    script = Path(__file__).parent / "gpu_run.py"
    folders = [model_folder, gaussian_folder, conditional_folder, clip, shards, vae_folder, pictures, tmp_path]
    subprocess.run([sys.executable, script, *folders], check=True, timeout=300)
