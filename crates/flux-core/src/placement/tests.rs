//! What the placement promises, over many clusters.

mod desired;
mod optimum;
mod plan;
mod simulation;
