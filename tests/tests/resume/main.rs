//! Both sides honest, the links not: what is lost is dialled again, what is suspended goes on, what is unknown is asked for.

mod devices;
mod lanes;
mod lies_received;
mod lies_sent;
mod outcome;
mod pairs;
mod small_losses;
mod stuck;
mod suspended;
mod switchover;
