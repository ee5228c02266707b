//! What the log and snapshots promise, checked from outside on a simulated and a real disk.

mod damage;
mod faults;
mod files;
mod fuzz;
mod lifecycle;
mod power_cut;
mod resets;
mod snapshots;
mod support;
mod tail;
mod trim;
mod watched;
