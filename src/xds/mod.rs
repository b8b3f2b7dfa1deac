//! Protocol: resources of the control plane.
