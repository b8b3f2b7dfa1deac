//! The CNI plugin's installation, against real folders: put in, kept in, taken out.

mod configuration;
mod crash;
mod files;
mod guard;
mod node;
mod removal;
