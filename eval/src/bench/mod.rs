//! `make bench`: what daisy costs, by itself and beside others.
//!
//! Scenarios stand in [`cases`], how each contestant is set up in [`contestant`], the two networks in [`wire`] (one
//! link, raw frames) and [`network`] (real connections), what measures in [`cpu`], [`generator`], [`load`] and
//! [`memory`], and what is made of the figures in [`record`], [`summary`] and [`report`].

pub mod cases;
pub mod contestant;
pub mod cpu;
pub mod generator;
pub mod load;
pub mod machine;
pub mod memory;
pub mod micro;
pub mod network;
pub mod record;
pub mod report;
pub mod spoof;
pub mod stats;
pub mod summary;
pub mod wire;
