//! Scenarios, figures and plots. The demo is the first scenario.

#![forbid(unsafe_code)]

pub mod bench;
pub mod plot;
pub mod report;
pub mod scenario;
