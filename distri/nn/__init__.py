"""The operators' numerics in torch, under the file names of `distri.core.ops`; the same for every backend."""
