"""Run by another Python, in which optimum-onnx is installed: draw from a directory of ONNX files, keep the images.

    python optimum_draws.py DIRECTORY CLASS OUTPUT.npz JSON

JSON: the arguments of the calls, by name of the image in OUTPUT; ``seed`` among them.
"""

import json
import sys

import numpy as np
import optimum.onnxruntime
import torch

torch.set_num_threads(1)
directory, kind, output, calls = sys.argv[1:]
pipeline = getattr(optimum.onnxruntime, kind).from_pretrained(directory)
pipeline.set_progress_bar_config(disable=True)
images = {}
for name, given in json.loads(calls).items():
    generator = torch.Generator().manual_seed(given.pop("seed"))
    images[name] = pipeline(**given, generator=generator, output_type="np").images
np.savez(output, **images)
