"""The operators' numerics in torch, under the file names of `distri.core.ops`; written once for every backend and model."""
