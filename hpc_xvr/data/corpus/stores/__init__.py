"""The two file formats of a corpus behind one small interface: Zarr v3 and HDF5."""

from hpc_xvr.data.corpus.stores.base import Array, Clip, DamagedData, Store
from hpc_xvr.data.corpus.stores.hdf5 import Hdf5Store
from hpc_xvr.data.corpus.stores.zarr import ZarrStore

__all__ = ["STORES", "Array", "Clip", "DamagedData", "Hdf5Store", "Store", "ZarrStore"]

STORES: dict[str, type[ZarrStore] | type[Hdf5Store]] = {"zarr": ZarrStore, "hdf5": Hdf5Store}
