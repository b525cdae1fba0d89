"""Runs the programs beside this file on a video or a folder of images: python run.py VIDEO."""

import json
import sys
from pathlib import Path

import av  # reads frames; any other reader will do
import torch

import instanceformer.inference.export  # noqa: F401  registers the programs' operator and the state's type
from instanceformer.model.state import TrackState

here, source = Path(__file__).parent, Path(sys.argv[1])
about = json.loads((here / "about.json").read_text())
height, width = about["frame"]["height"], about["frame"]["width"]
encode, step = (torch.export.load(here / f"{name}.pt2").module() for name in ("encode", "step"))

# before the first frame of a video the whole state is zero
zeros = {name: torch.zeros(v["shape"], dtype=getattr(torch, v["type"])) for name, v in about["state"].items()}
state = TrackState.from_tensors(zeros)
count = 0
for path in sorted(source.iterdir()) if source.is_dir() else [source]:
    for picture in av.open(str(path)).decode(video=0):
        pixels = torch.from_numpy(picture.to_ndarray(width=width, height=height, format="rgb24"))  # (H, W, 3) uint8
        features = encode(pixels.permute(2, 0, 1)[None])  # (1, 3, H, W)
        scores, boxes, shown, masks, state = step(*features, state)  # the next frame takes the new state
        for query, mask in zip(shown[0].tolist(), masks[0], strict=True):  # a query is an identity
            score, label = scores[0, query].max(dim=0)
            if score >= 0.5:
                name = about["categories"][label]["name"]
                box = boxes[0, query].tolist()  # center x, center y, width and height, as fractions of the frame
                print(f"frame {count}: query {query}, {name} {score:.2f}, box {box}, mask of {(mask > 0).sum()} cells")
        count += 1
