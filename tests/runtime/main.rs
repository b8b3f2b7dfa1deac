//! Pods of a real container runtime: containerd and runc, driven through the interface that a kubelet uses.

mod ambient;
mod bridge;
mod containerd;
mod cri;
mod image;
mod leftovers;
mod mesh;
mod pod;
mod space;
mod wire;
