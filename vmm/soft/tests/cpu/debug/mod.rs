//! Software step, breakpoints and watchpoints, rule by rule (Arm ARM D2).

mod breakpoints;
mod guest;
mod step;
mod watchpoints;
