"""A corpus: a folder of recordings that training and evaluation read crops from."""

from hpc_xvr.data.corpus.frames import Frames
from hpc_xvr.data.corpus.reader import Corpus, DamagedVideo, Video, Videos

__all__ = ["Corpus", "DamagedVideo", "Frames", "Video", "Videos"]
