"""Checkpoints: directories that are whole or do not exist.

    checkpoints/step-00001000/
        model-00000.safetensors     parameters; one file a rank, each holding that rank's pieces
        optim-00000.safetensors     tensors named optim.*, apart so that loading a model never reads them
        state.json                  everything else: config, step, sample cursor, counters, tokenizer hash
        manifest.json               size and sha256 of each file; shape, dtype and pieces of each tensor; its own hash

The manifest is written last, and the directory gets its name by one rename after every byte is on the disk. So a
reader finds the old state or the new one, and a directory whose manifest does not hold is no checkpoint at all.
Nothing here unpickles. shard.py is one file of tensors, layout.py who writes what, manifest.py the proof, folder.py one
checkpoint, series.py those of a run, ranks.py how many ranks do it as one, saver.py how training goes on meanwhile, and
whole.py makes one file of many.
"""

from minillm.checkpoint.folder import fill, load_tensors, match_tensors, read, verify, write
from minillm.checkpoint.manifest import OPTIM, TENSORS, files_of
from minillm.checkpoint.ranks import ALONE
from minillm.checkpoint.saver import PATIENCE, Saver
from minillm.checkpoint.series import candidates, folder_of, latest, save
from minillm.checkpoint.shard import DTYPES
from minillm.checkpoint.whole import block_reader, describe, write_whole

__all__ = [
    "ALONE",
    "DTYPES",
    "OPTIM",
    "PATIENCE",
    "TENSORS",
    "Saver",
    "block_reader",
    "candidates",
    "describe",
    "files_of",
    "fill",
    "folder_of",
    "latest",
    "load_tensors",
    "match_tensors",
    "read",
    "save",
    "verify",
    "write",
    "write_whole",
]
