//! `Branch`: a task of our own, in the sense of asyncio's "Extending asyncio" page.
//!
//! Model. A branch starts its coroutine inside the parent's step and stays the same object from the first step to the last:
//! it is `current_task()` while its coroutine runs, has a context and cancel counters of its own, and is itself the
//! done-callback of whatever future its coroutine waits for. Nothing is scheduled to start it and nothing to report its end.
//!
//! The type derives from `asyncio.Task`, so that `isinstance` says what it is, but the base is never initialised: its part of
//! the object stays zeroed (but for two references that it would hand out without looking) and every public method, `__repr__` and the private names that libraries read are overridden. Our
//! own data stands behind the base's size, which is read when the type is made.
//!
//! States. pending (its coroutine is suspended: waits for `waiting_for`, or is queued for a turn) -> done (value, exception
//! or cancelled). A step is: enter the context, become the current task, resume the coroutine, leave both, look at what came.
//!
//! Invariants.
//! - The data is reached through `cell` alone and never borrowed while Python runs.
//! - A future is waited for with exactly one callback; `waiting_for` is taken before the coroutine is resumed.
//! - Every way in (callback, turn, start) ends in `settled`, so the split always hears of the end; what fails on our side
//!   becomes the branch's error.
#![allow(unsafe_code, reason = "the object is laid out by hand, see branch_type.rs")]

use std::cell::RefCell;
use std::mem;
use std::sync::{PoisonError, RwLock};

use pyo3::exceptions::PyRuntimeError;
use pyo3::ffi;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyString, PyTuple, PyType};

use super::branch_type::woken;
use super::errors::CancelledError;
use super::run::{Input, Step, step};
use super::split::Split;

/// How a branch ended.
pub(super) enum Status {
    Pending,
    Returned(Py<PyAny>),
    Raised(Py<PyAny>),
    Cancelled(Option<Py<PyAny>>),
}

/// Whether the branch is being added to a future's callbacks just now, and whether the future has called it meanwhile.
pub(super) enum Adding {
    Done,
    Now,
    CalledEarly,
}

/// What a branch owns.
pub(super) struct Data {
    pub(super) split: Option<Py<Split>>,
    pub(super) index: usize,
    pub(super) coroutine: Option<Py<PyAny>>,
    pub(super) context: Py<PyAny>,
    /// The future that wakes it; None while it runs or is queued.
    pub(super) waiting_for: Option<Py<PyAny>>,
    pub(super) adding: Adding,
    /// What the next step throws in: a future's or a protocol error.
    pub(super) pending_error: Option<PyErr>,
    /// A cancel that could not be passed on to a future.
    pub(super) must_cancel: bool,
    pub(super) message: Option<Py<PyAny>>,
    pub(super) cancelling: u32,
    /// Set by `__await__`, cleared by the task that awaits this branch.
    pub(super) blocking: bool,
    pub(super) status: Status,
    pub(super) callbacks: Vec<(Py<PyAny>, Py<PyAny>)>,
    pub(super) event_loop: Py<PyAny>,
    /// The name of what the branch runs; with its index it names the branch.
    pub(super) task_name: Py<PyString>,
    /// What `set_name` chose instead.
    pub(super) name: Option<Py<PyString>>,
}

/// The object behind the base: what the interpreter calls, then the data.
#[repr(C)]
pub(super) struct Tail {
    pub(super) vectorcall: ffi::vectorcallfunc,
    pub(super) cell: RefCell<Data>,
}

/// The type and the functions of asyncio that a step needs; made once.
pub(super) struct Kit {
    pub(super) class: Py<PyType>,
    pub(super) base: *mut ffi::PyTypeObject,
    /// Where `Tail` stands in the object.
    pub(super) offset: usize,
    /// Where the base keeps its coroutine and its context, which it hands out unseen: None stands there, not null.
    pub(super) base_references: [usize; 2],
    pub(super) enter: Py<PyAny>,
    pub(super) leave: Py<PyAny>,
    pub(super) context_keyword: Py<PyTuple>,
}

// SAFETY: `base` is `asyncio.Task`, which `class` keeps alive; it is only read.
unsafe impl Send for Kit {}
// SAFETY: as above.
unsafe impl Sync for Kit {}

pub(super) static KIT: PyOnceLock<Kit> = PyOnceLock::new();

pub(super) fn kit(py: Python<'_>) -> PyResult<&Kit> {
    KIT.get_or_try_init(py, || Kit::make(py))
}

/// What `configure_branches` chose; None until the first split or call asks.
static CHOSEN: RwLock<Option<bool>> = RwLock::new(None);

/// Whether splits run native branches, as far as it is the process' choice; checked when it is first asked.
pub(super) fn is_chosen(py: Python<'_>) -> bool {
    let chosen = *CHOSEN.read().unwrap_or_else(PoisonError::into_inner);
    chosen.unwrap_or_else(|| {
        let usable = usable(py);
        *CHOSEN.write().unwrap_or_else(PoisonError::into_inner) = Some(usable);
        usable
    })
}

/// Whether branches can be made on this interpreter; warns if not.
fn usable(py: Python<'_>) -> bool {
    let Err(error) = kit(py) else { return true };
    let text = format!("native branches are not available here, asyncio tasks are used: {}", error.value(py));
    let category = py.get_type::<pyo3::exceptions::PyRuntimeWarning>();
    let told = py.import("warnings").and_then(|warnings| warnings.call_method1("warn", (text, category)));
    if let Err(error) = told {
        error.write_unraisable(py, None);
    }
    false
}

/// Chooses how splits run their branches from now on.
#[pyfunction]
#[pyo3(signature = (native, /))]
pub(super) fn configure_branches(py: Python<'_>, native: bool) {
    let chosen = native && usable(py);
    *CHOSEN.write().unwrap_or_else(PoisonError::into_inner) = Some(chosen);
}

pub(super) fn cell<'a>(kit: &Kit, branch: &'a Bound<'_, PyAny>) -> &'a RefCell<Data> {
    debug_assert!(branch.get_type().is(kit.class.bind(branch.py())));
    // SAFETY: only objects of `class` get here: methods and slots of a type are called with its instances (it cannot be
    // derived from), and the rest of this crate passes what `new` made. `new` writes the tail before the object is seen.
    unsafe { &(*branch.as_ptr().byte_add(kit.offset).cast::<Tail>()).cell }
}

pub(super) fn with<R>(branch: &Bound<'_, PyAny>, access: impl FnOnce(&mut Data) -> R) -> PyResult<R> {
    let kit = kit(branch.py())?;
    Ok(access(&mut cell(kit, branch).borrow_mut()))
}

/// Makes a branch that has not run yet.
pub(super) fn new<'py>(
    split: &Bound<'py, Split>,
    index: usize,
    task_name: Py<PyString>,
    coroutine: Bound<'py, PyAny>,
    context: Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyAny>> {
    let py = split.py();
    let kit = kit(py)?;
    let data = Data {
        split: Some(split.clone().unbind()),
        index,
        coroutine: Some(coroutine.unbind()),
        context: context.unbind(),
        waiting_for: None,
        adding: Adding::Done,
        pending_error: None,
        must_cancel: false,
        message: None,
        cancelling: 0,
        blocking: false,
        status: Status::Pending,
        callbacks: Vec::new(),
        event_loop: split.get().event_loop(py).clone().unbind(),
        task_name,
        name: None,
    };
    // SAFETY: `tp_alloc` of a GC type gives a zeroed, tracked object of `basicsize`, which reserves `Tail` at `offset`;
    // `base_references` are fields of the base that hold a reference or null. No Python runs between the allocation and the
    // write (the collector may only run inside the allocation).
    unsafe {
        let class = kit.class.as_ptr().cast::<ffi::PyTypeObject>();
        let object = ffi::PyType_GenericAlloc(class, 0);
        if object.is_null() {
            return Err(PyErr::fetch(py));
        }
        for offset in kit.base_references {
            object.byte_add(offset).cast::<*mut ffi::PyObject>().write(py.None().into_ptr());
        }
        let tail = object.byte_add(kit.offset).cast::<Tail>();
        tail.write(Tail { vectorcall: woken, cell: RefCell::new(data) });
        Ok(Bound::from_owned_ptr(py, object))
    }
}

/// A copy of the current context.
pub(super) fn copy_context(py: Python<'_>) -> PyResult<Bound<'_, PyAny>> {
    // SAFETY: returns a new reference or sets an exception.
    unsafe { Bound::from_owned_ptr_or_err(py, ffi::PyContext_CopyCurrent()) }
}

/// A copy of a context.
pub(super) fn copy_of<'py>(context: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    // SAFETY: takes a context, which `copy_context` made; returns a new reference or sets an exception.
    unsafe { Bound::from_owned_ptr_or_err(context.py(), ffi::PyContext_Copy(context.as_ptr())) }
}

/// While the parent's step runs branches, it is not the current task.
pub(super) fn leave(event_loop: &Bound<'_, PyAny>, task: &Bound<'_, PyAny>) -> PyResult<()> {
    kit(task.py())?.leave.bind(task.py()).call1((event_loop, task)).map(drop)
}

pub(super) fn enter(event_loop: &Bound<'_, PyAny>, task: &Bound<'_, PyAny>) -> PyResult<()> {
    kit(task.py())?.enter.bind(task.py()).call1((event_loop, task)).map(drop)
}

/// One step in the branch's own context. An error is one that ends the process' loop as well (`KeyboardInterrupt`).
pub(super) fn step_in_context(branch: &Bound<'_, PyAny>, event_loop: &Bound<'_, PyAny>) -> PyResult<()> {
    let py = branch.py();
    let context = with(branch, |data| data.context.clone_ref(py))?;
    // SAFETY: `context` is a context; it is left below on every way.
    if unsafe { ffi::PyContext_Enter(context.as_ptr()) } < 0 {
        let error = PyErr::fetch(py);
        return settled(branch, Step::Raised(error));
    }
    let outcome = step_entered(branch, event_loop);
    // SAFETY: entered above, by this thread.
    if unsafe { ffi::PyContext_Exit(context.as_ptr()) } < 0 {
        return outcome.and(Err(PyErr::fetch(py)));
    }
    outcome
}

/// One step; the context is entered already.
fn step_entered(branch: &Bound<'_, PyAny>, event_loop: &Bound<'_, PyAny>) -> PyResult<()> {
    let py = branch.py();
    let kit = kit(py)?;
    let Some((coroutine, input)) = next_input(kit, branch) else {
        return Ok(());
    };
    if let Err(error) = kit.enter.bind(py).call1((event_loop, branch)) {
        return settled(branch, Step::Raised(error));
    }
    let came = step(coroutine.bind(py), input);
    if let Err(error) = kit.leave.bind(py).call1((event_loop, branch)) {
        return settled(branch, Step::Raised(error));
    }
    match came {
        Step::Yielded(value) => {
            waits(kit, branch, event_loop, value);
            Ok(())
        }
        came => {
            drop(coroutine);
            settled(branch, cancelled_at_the_end(kit, branch, came))
        }
    }
}

/// A coroutine that returns while it is asked to end was cancelled, as any task of asyncio's.
fn cancelled_at_the_end<'py>(kit: &Kit, branch: &Bound<'py, PyAny>, came: Step<'py>) -> Step<'py> {
    if !matches!(came, Step::Returned(_)) {
        return came;
    }
    let message = {
        let mut data = cell(kit, branch).borrow_mut();
        if !mem::take(&mut data.must_cancel) {
            return came;
        }
        data.message.take()
    };
    Step::Raised(cancelled_error(message))
}

/// The coroutine and what it is resumed with; None if the branch is done.
fn next_input<'py>(kit: &Kit, branch: &Bound<'py, PyAny>) -> Option<(Py<PyAny>, Input<'py>)> {
    let py = branch.py();
    let (coroutine, mut error, must_cancel, message) = {
        let mut data = cell(kit, branch).borrow_mut();
        let coroutine = data.coroutine.as_ref()?.clone_ref(py);
        let must_cancel = mem::take(&mut data.must_cancel);
        let message = if must_cancel { data.message.take() } else { None };
        (coroutine, data.pending_error.take(), must_cancel, message)
    };
    // A cancellation that arrives as an exception already is the one that was asked for.
    if must_cancel && !error.as_ref().is_some_and(|error| error.is_instance_of::<CancelledError>(py)) {
        error = Some(cancelled_error(message));
    }
    Some((coroutine, error.map_or_else(|| Input::nothing(py), Input::Throw)))
}

pub(super) fn cancelled_error(message: Option<Py<PyAny>>) -> PyErr {
    match message {
        Some(message) => CancelledError::new_err((message,)),
        None => CancelledError::new_err(()),
    }
}

/// The coroutine yielded: a future to wait for, or nothing, which is a wish for another turn.
fn waits(kit: &Kit, branch: &Bound<'_, PyAny>, event_loop: &Bound<'_, PyAny>, value: Bound<'_, PyAny>) {
    if value.is_none() {
        queue(kit, branch);
        return;
    }
    if let Err(error) = wait_for(kit, branch, event_loop, &value) {
        cell(kit, branch).borrow_mut().pending_error = Some(error);
        queue(kit, branch);
    }
}

fn queue(kit: &Kit, branch: &Bound<'_, PyAny>) {
    let py = branch.py();
    let split = cell(kit, branch).borrow().split.as_ref().map(|split| split.clone_ref(py));
    if let Some(split) = split {
        Split::queue(split.bind(py), branch);
    }
}

/// Becomes the done-callback of a future, after the checks that `asyncio.Task` makes.
fn wait_for(
    kit: &Kit,
    branch: &Bound<'_, PyAny>,
    event_loop: &Bound<'_, PyAny>,
    future: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let py = branch.py();
    let flag = intern!(py, "_asyncio_future_blocking");
    match future.getattr_opt(flag)? {
        Some(blocking) if blocking.is_none() => return Err(bad_yield(branch, future)),
        None => return Err(bad_yield(branch, future)),
        Some(blocking) if !blocking.is_truthy()? => {
            let text = format!("yield was used instead of yield from in {} with {future:?}", branch.repr()?);
            return Err(PyRuntimeError::new_err(text));
        }
        Some(_) => {}
    }
    if future.is(branch) {
        return Err(PyRuntimeError::new_err(format!("a branch cannot await on itself: {}", branch.repr()?)));
    }
    if !future.call_method0(intern!(py, "get_loop"))?.is(event_loop) {
        let text = format!("{} got Future {} attached to a different loop", branch.repr()?, future.repr()?);
        return Err(PyRuntimeError::new_err(text));
    }
    future.setattr(flag, false)?;
    let kept = future.clone().unbind();
    let context = {
        let mut data = cell(kit, branch).borrow_mut();
        data.waiting_for = Some(kept);
        data.adding = Adding::Now;
        data.context.clone_ref(py)
    };
    // SAFETY: a method call with two positional arguments (the first is the object) and one keyword.
    let added = unsafe {
        let arguments = [future.as_ptr(), branch.as_ptr(), context.as_ptr()];
        let name = intern!(py, "add_done_callback").as_ptr();
        let added = ffi::PyObject_VectorcallMethod(name, arguments.as_ptr(), 2, kit.context_keyword.as_ptr());
        Bound::from_owned_ptr_or_err(py, added)
    };
    let (waits_for_nothing, cancel, message) = {
        let mut data = cell(kit, branch).borrow_mut();
        let adding = mem::replace(&mut data.adding, Adding::Done);
        let waited =
            if matches!(adding, Adding::CalledEarly) || added.is_err() { data.waiting_for.take() } else { None };
        let message = data.message.as_ref().map(|message| message.clone_ref(py));
        (waited, data.must_cancel, message)
    };
    drop(added?);
    if waits_for_nothing.is_some() {
        take_result(kit, branch, future);
        queue(kit, branch);
        return Ok(());
    }
    if cancel && pass_cancel_on(future, message.as_ref())? {
        cell(kit, branch).borrow_mut().must_cancel = false;
    }
    Ok(())
}

/// A failed future's exception is thrown in, as a Task does: hand-written awaitables rely on it.
fn take_result(kit: &Kit, branch: &Bound<'_, PyAny>, future: &Bound<'_, PyAny>) {
    if let Err(error) = future.call_method0(intern!(branch.py(), "result")) {
        cell(kit, branch).borrow_mut().pending_error = Some(error);
    }
}

fn bad_yield(branch: &Bound<'_, PyAny>, value: &Bound<'_, PyAny>) -> PyErr {
    match (branch.repr(), value.repr()) {
        (Ok(branch), Ok(value)) => PyRuntimeError::new_err(format!("{branch} got bad yield: {value}")),
        (Err(error), _) | (_, Err(error)) => error,
    }
}

fn pass_cancel_on(future: &Bound<'_, PyAny>, message: Option<&Py<PyAny>>) -> PyResult<bool> {
    let name = intern!(future.py(), "cancel");
    match message {
        Some(message) => future.call_method1(name, (message,)),
        None => future.call_method0(name),
    }?
    .is_truthy()
}

/// The coroutine ended: tells the split, and whoever waits for the branch itself.
pub(super) fn settled(branch: &Bound<'_, PyAny>, came: Step<'_>) -> PyResult<()> {
    let py = branch.py();
    let kit = kit(py)?;
    let (outcome, status, passes) = match came {
        Step::Returned(value) | Step::Yielded(value) => {
            let value = value.unbind();
            (Ok(value.clone_ref(py)), Status::Returned(value), None)
        }
        Step::Raised(error) => {
            let value = error.value(py).clone().into_any().unbind();
            let status = if error.is_instance_of::<CancelledError>(py) {
                Status::Cancelled(Some(value))
            } else {
                Status::Raised(value)
            };
            let passes = ends_the_loop(py, &error).then(|| error.clone_ref(py));
            (Err(error), status, passes)
        }
    };
    let (old, split, index, callbacks, coroutine) = {
        let mut data = cell(kit, branch).borrow_mut();
        let old = mem::replace(&mut data.status, status);
        (old, data.split.take(), data.index, mem::take(&mut data.callbacks), data.coroutine.take())
    };
    drop((old, coroutine));
    if let Some(split) = split {
        let split = split.bind(py);
        for (callback, context) in callbacks {
            schedule(split, branch, &callback, &context);
        }
        Split::ended(split, index, outcome);
    }
    passes.map_or(Ok(()), Err)
}

/// The two exceptions that asyncio lets out of the loop as well.
fn ends_the_loop(py: Python<'_>, error: &PyErr) -> bool {
    error.is_instance_of::<pyo3::exceptions::PyKeyboardInterrupt>(py)
        || error.is_instance_of::<pyo3::exceptions::PySystemExit>(py)
}

fn schedule(split: &Bound<'_, Split>, branch: &Bound<'_, PyAny>, callback: &Py<PyAny>, context: &Py<PyAny>) {
    let py = branch.py();
    let scheduled = {
        let options = PyDict::new(py);
        options.set_item(intern!(py, "context"), context).and_then(|()| {
            let event_loop = split.get().event_loop(py);
            event_loop.call_method(intern!(py, "call_soon"), (callback, branch), Some(&options))
        })
    };
    if let Err(error) = scheduled {
        error.write_unraisable(py, Some(branch));
    }
}

/// Asks a branch to end.
pub(super) fn cancel(branch: &Bound<'_, PyAny>, message: Option<&Bound<'_, PyAny>>) -> PyResult<bool> {
    let py = branch.py();
    let kept = message.filter(|message| !message.is_none()).map(|message| message.clone().unbind());
    let waiting_for = {
        let kit = kit(py)?;
        let mut data = cell(kit, branch).borrow_mut();
        if !matches!(data.status, Status::Pending) {
            return Ok(false);
        }
        data.cancelling += 1;
        data.waiting_for.as_ref().map(|future| future.clone_ref(py))
    };
    if let Some(future) = waiting_for
        && pass_cancel_on(future.bind(py), kept.as_ref())?
    {
        return Ok(true);
    }
    let old = with(branch, |data| {
        data.must_cancel = true;
        mem::replace(&mut data.message, kept)
    })?;
    drop(old);
    Ok(true)
}

/// Ends a branch without another step of the loop: its coroutine is closed.
pub(super) fn close(branch: &Bound<'_, PyAny>) -> PyResult<()> {
    let py = branch.py();
    let (coroutine, future) = with(branch, |data| {
        data.split = None;
        data.status = Status::Cancelled(None);
        (data.coroutine.take(), data.waiting_for.take())
    })?;
    if let Some(future) = future {
        future.bind(py).call_method1(intern!(py, "remove_done_callback"), (branch,))?;
    }
    if let Some(coroutine) = coroutine {
        coroutine.bind(py).call_method0(intern!(py, "close"))?;
    }
    Ok(())
}

/// The future that a branch waits for is done: the event loop calls the branch, inside its context.
pub(super) fn wake(branch: &Bound<'_, PyAny>, future: &Bound<'_, PyAny>) -> PyResult<()> {
    let py = branch.py();
    let kit = kit(py)?;
    let (waited, split) = {
        let mut data = cell(kit, branch).borrow_mut();
        if !matches!(data.status, Status::Pending) || !data.waiting_for.as_ref().is_some_and(|own| own.is(future)) {
            return Ok(());
        }
        if !matches!(data.adding, Adding::Done) {
            data.adding = Adding::CalledEarly;
            return Ok(());
        }
        (data.waiting_for.take(), data.split.as_ref().map(|split| split.clone_ref(py)))
    };
    drop(waited);
    let Some(split) = split else { return Ok(()) };
    take_result(kit, branch, future);
    let split = split.bind(py);
    let outcome = step_entered(branch, split.get().event_loop(py));
    Split::after_callback(split);
    outcome
}
