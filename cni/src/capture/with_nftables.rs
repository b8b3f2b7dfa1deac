//! The rules of a pod as nftables holds them.

use std::os::fd::BorrowedFd;

use super::{CaptureError, Standing};
use crate::nftables::listing::{ARGUMENTS, Listing};
use crate::nftables::{self, INET, render};
use crate::program::Place;
use crate::rules::{CaptureConfig, Table};

/// What is held of ours, and how it differs from what should be.
pub struct Rules {
    script: String,
    is_fresh: bool,
    difference: Option<String>,
}

impl Rules {
    pub fn read(netns: BorrowedFd<'_>, config: &CaptureConfig) -> Result<Self, CaptureError> {
        let script = render::script(config);
        let wanted = parse(&nftables::reference(&script, &ARGUMENTS)?);
        let held = parse(&nftables::print(Place::Pod(netns), &ARGUMENTS)?);
        Ok(Self {
            script,
            is_fresh: held.is_empty(),
            difference: held.difference(&wanted),
        })
    }
}

impl Standing for Rules {
    fn difference(&self) -> Option<&str> {
        self.difference.as_deref()
    }

    fn conflict(&self) -> Option<&str> {
        self.difference().filter(|_| !self.is_fresh)
    }

    fn is_fresh(&self) -> bool {
        self.is_fresh
    }

    fn apply(&self, netns: BorrowedFd<'_>, _: &CaptureConfig) -> Result<(), CaptureError> {
        Ok(nftables::apply(Place::Pod(netns), &self.script)?)
    }
}

/// Whether there are tables of ours.
pub fn holds(netns: BorrowedFd<'_>) -> Result<bool, CaptureError> {
    let tables = nftables::tables(netns)?;
    let ours = |(family, name): &(u8, String)| *family == INET && names().contains(&&**name);
    Ok(tables.iter().any(ours))
}

/// Takes out whatever is there of ours.
pub fn remove(netns: BorrowedFd<'_>) -> Result<(), CaptureError> {
    if holds(netns)? {
        nftables::apply(Place::Pod(netns), &render::removal())?;
    }
    Ok(())
}

fn parse(text: &str) -> Listing {
    Listing::parse(text, &names())
}

fn names() -> [&'static str; 4] {
    Table::ALL.map(render::table)
}
