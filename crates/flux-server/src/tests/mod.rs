//! The real workers, with their threads and sockets, over disks that lose what a real one can lose.

mod batching;
mod clustered;
mod connections;
mod faults;
mod feed;
mod joining;
mod machine;
mod native;
mod node;
mod power_cut;
mod relayout;
mod resp_client;
mod workload;
