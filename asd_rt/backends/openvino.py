"""The OpenVINO provider of ONNX Runtime, a plugin: how it is found, and the session options it wants.

It runs an engine in bfloat16 where the processor can (AMX, AVX-512 BF16), which plain ONNX Runtime cannot.
Compiled models are kept on disk, so that an engine opens fast the second time.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from asd_rt.errors import BackendError
from asd_rt.files import cache_folder, replacing

PROVIDER = "OpenVINOExecutionProvider"
INSTALL = "pip install onnxruntime-ep-openvino"
_LIBRARY = "asd_rt_openvino"


@cache
def cpu_device(ort: Any) -> Any:
    """The provider's CPU device; loads the plugin once a process.

    Raises:
        BackendError: the plugin is not installed, does not load, or sees no CPU it supports.
    """
    try:
        import onnxruntime_ep_openvino as plugin
    except ImportError as error:
        raise BackendError(
            f"the OpenVINO provider of ONNX Runtime is not installed ({error}); {INSTALL}"
        ) from error
    try:
        ort.register_execution_provider_library(_LIBRARY, plugin.get_library_path())
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        first_line = str(error).strip().splitlines()[0]
        raise BackendError(
            f"the OpenVINO provider cannot be loaded into ONNX Runtime {ort.__version__} ({first_line}); "
            f"upgrade both: {INSTALL} --upgrade onnxruntime"
        ) from error
    for device in ort.get_ep_devices():
        if device.ep_name == plugin.get_ep_name() and device.ep_metadata.get("ov_device") == "CPU":
            return device
    raise BackendError("the OpenVINO provider finds no processor that it supports")


def add_openvino(ort: Any, options: Any, precision: str, threads: int) -> None:
    """Let a session of these options run on OpenVINO's CPU, all of it or not at all.

    Args:
        ort: the onnxruntime module.
        options: a SessionOptions.
        precision: "bf16" or "f32", of matrix products and attention.
        threads: of one session.
    """
    device = cpu_device(ort)
    settings: dict[str, str] = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": str(threads),
        "NUM_STREAMS": "1",
    }
    folder = cache_folder()
    if folder is None:
        raise BackendError(
            "OpenVINO needs a folder for its settings and compiled models; set ASD_RT_CACHE to one that can "
            "be written"
        )
    models = folder / "openvino"
    models.mkdir(exist_ok=True)
    settings["CACHE_DIR"] = str(models)
    file = folder / f"openvino-{precision}-{threads}.json"
    text = json.dumps({"CPU": settings})
    if not file.is_file() or file.read_text() != text:
        with replacing(file) as temporary:
            temporary.write_text(text)
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    options.add_provider_for_devices([device], {"load_config": str(file)})
