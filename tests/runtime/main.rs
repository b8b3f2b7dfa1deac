//! Pods of a real container runtime: containerd and runc, driven through the interface that a kubelet uses.

mod bridge;
mod containerd;
mod cri;
mod image;
mod leftovers;
mod pod;
mod space;
