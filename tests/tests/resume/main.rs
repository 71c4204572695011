//! Both sides honest, the links not: what is lost is dialled again, what is suspended goes on, what is unknown is asked for.

mod lanes;
mod outcome;
mod pairs;
mod suspended;
