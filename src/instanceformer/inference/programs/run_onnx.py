"""Runs the programs beside this file on a video or a folder of images: python run.py VIDEO."""

import json
import sys
from pathlib import Path

import av  # reads frames; any other reader will do
import numpy as np
import onnxruntime

here, source = Path(__file__).parent, Path(sys.argv[1])
about = json.loads((here / "about.json").read_text())
height, width = about["frame"]["height"], about["frame"]["width"]
encode, step = (onnxruntime.InferenceSession(here / f"{name}.onnx") for name in ("encode", "step"))
names = [[output.name for output in program.get_outputs()] for program in (encode, step)]

# before the first frame of a video the whole state is zero
state = {name: np.zeros(value["shape"], dtype=value["type"]) for name, value in about["state"].items()}
count = 0
for path in sorted(source.iterdir()) if source.is_dir() else [source]:
    for picture in av.open(str(path)).decode(video=0):
        pixels = picture.to_ndarray(width=width, height=height, format="rgb24")  # (H, W, 3) uint8
        features = encode.run(None, {"frame": pixels.transpose(2, 0, 1)[None]})  # (1, 3, H, W)
        inputs = dict(zip(names[0], features, strict=True)) | state
        outputs = dict(zip(names[1], step.run(None, inputs), strict=True))
        state = {name: outputs[f"next_{name}"] for name in state}  # the next frame takes the new state
        for query, mask in zip(outputs["shown"][0], outputs["masks"][0], strict=True):  # a query is an identity
            scores = outputs["scores"][0, query]
            if scores.max() >= 0.5:
                name, score = about["categories"][scores.argmax()]["name"], scores.max()
                box = outputs["boxes"][0, query].tolist()  # center x, center y, width and height, as fractions
                print(f"frame {count}: query {query}, {name} {score:.2f}, box {box}, mask of {(mask > 0).sum()} cells")
        count += 1
