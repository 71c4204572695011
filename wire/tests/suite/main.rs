//! The tests of the stream format: one binary, one file per claim about it.
//!
//! | file | what it shows |
//! |---|---|
//! | `vectors` | every committed vector is read as it says, and our own encoder writes the same octets |
//! | `fields` | the tables of fields in SPEC.md: sizes, names and bounds are those of the code |
//! | `frames` | truncation, reserved bits and damage are refused, for every kind, by one harness |
//! | `bounds` | each limit: the last value that is taken and the first that is not |
//! | `codes` | codes and numbers with an owner mean what they say, both ways |
//! | `hello` | hellos, replies and negotiation |
//! | `device_state` | the arcs between the states of a device |
//! | `parameters` | values of features: what is taken, what is refused, what is passed over |
//! | `pulse` | KEEP_ALIVE: no echo makes the round trip longer, and no answer is answered |
//! | `layout` | region tables and runs |
//! | `digest` | the digest does not depend on order and sees every difference |
//! | `round_trip` | arbitrary frames come back as they went |
//! | `sessions` | the vectors of whole sessions keep every rule, and illegal ones break the rule that they cite; `onlooker` reads them |
//! | `bodies` | the fuzz bodies hold over the committed corpus and over damaged frames |
//! | `specification` | SPEC.md and the code say the same |

mod bodies;
mod bounds;
mod codes;
mod device_state;
mod digest;
mod fields;
mod frames;
mod hello;
mod layout;
mod onlooker;
mod parameters;
mod pulse;
mod round_trip;
mod sessions;
mod specification;
mod support;
mod vectors;
