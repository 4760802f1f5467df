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
//! or cancelled). A step is: enter the context, become the current task, resume the coroutine, leave the context, look at
//! what came. Who was the current task before gets that place back when the last of the steps in a row is done (`seat`).
//!
//! Invariants.
//! - The data is reached through `cell` alone and never borrowed while Python runs.
//! - A future is waited for with exactly one callback; `waiting_for` is taken before the coroutine is resumed.
//! - Every way in (callback, turn, start) ends in `settled`, so the split always hears of the end; what fails on our side
//!   becomes the branch's error.
#![allow(unsafe_code, reason = "the object is laid out by hand, see branch_type.rs")]

use std::cell::RefCell;
use std::mem;
use std::ptr;
use std::sync::{PoisonError, RwLock};

use pyo3::exceptions::{PyBaseException, PyException, PyKeyboardInterrupt, PyRuntimeError, PySystemExit};
use pyo3::ffi;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyString, PyTuple, PyType};

use super::branch_type::woken;
use super::current::{Current, Seat};
use super::errors::CancelledError;
use super::run::{Input, Step, step};
use super::split::{Came, Split};

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
    pub(super) current: Current,
    /// The future written in C, which does what asyncio's documentation says and no more.
    pub(super) future: Py<PyAny>,
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

/// Runs `body` in a context; None if the context is entered already, by somebody further up.
pub(super) fn within<R>(context: &Bound<'_, PyAny>, body: impl FnOnce() -> PyResult<R>) -> Option<PyResult<R>> {
    // SAFETY: `context` is a context, or this fails; it is left below on every way.
    if unsafe { ffi::PyContext_Enter(context.as_ptr()) } < 0 {
        drop(PyErr::fetch(context.py()));
        return None;
    }
    let outcome = body();
    // SAFETY: entered above, by this thread.
    if unsafe { ffi::PyContext_Exit(context.as_ptr()) } < 0 {
        return Some(outcome.and(Err(PyErr::fetch(context.py()))));
    }
    Some(outcome)
}

/// The place of the current task, for as long as branches are stepped.
pub(super) fn seat<'py, 'a>(event_loop: &'a Bound<'py, PyAny>) -> PyResult<Seat<'py, 'a>> {
    Seat::hold(&kit(event_loop.py())?.current, event_loop)
}

/// Whether no task is the current one.
pub(super) fn is_free(event_loop: &Bound<'_, PyAny>) -> PyResult<bool> {
    kit(event_loop.py())?.current.is_free(event_loop)
}

/// One step in the branch's own context, by who holds the seat. An error is one that ends the process' loop as well
/// (`KeyboardInterrupt`).
pub(super) fn step_in_context(branch: &Bound<'_, PyAny>, event_loop: &Bound<'_, PyAny>) -> PyResult<()> {
    let py = branch.py();
    let context = with(branch, |data| data.context.clone_ref(py))?;
    within(context.bind(py), || step_entered(branch, event_loop)).unwrap_or_else(|| {
        let text = format!("the context of {} is entered already", branch.repr()?);
        settled(branch, Err(PyRuntimeError::new_err(text).into_value(py)))
    })
}

/// One step; the context is entered already.
fn step_entered(branch: &Bound<'_, PyAny>, event_loop: &Bound<'_, PyAny>) -> PyResult<()> {
    let py = branch.py();
    let kit = kit(py)?;
    let Some((coroutine, input)) = next_input(kit, branch) else {
        return Ok(());
    };
    if let Err(error) = kit.current.take(event_loop, branch) {
        return settled(branch, Err(error.into_value(py)));
    }
    let outcome = match input {
        Input::Send(value) => match send(coroutine.bind(py), &value) {
            Sent::Yielded(value) => {
                waits(kit, branch, event_loop, value);
                return Ok(());
            }
            Sent::Ended(outcome) => outcome,
        },
        input @ Input::Throw(_) => match step(coroutine.bind(py), input) {
            Step::Yielded(value) => {
                waits(kit, branch, event_loop, value);
                return Ok(());
            }
            Step::Returned(value) => Ok(value.unbind()),
            Step::Raised(error) => Err(error.into_value(py)),
        },
    };
    drop(coroutine);
    settled(branch, cancelled_at_the_end(kit, branch, outcome))
}

enum Sent<'py> {
    Yielded(Bound<'py, PyAny>),
    Ended(Came),
}

/// As `step`, without a `PyErr` in between: losers and failures of a wide split are many.
fn send<'py>(coroutine: &Bound<'py, PyAny>, value: &Bound<'py, PyAny>) -> Sent<'py> {
    let py = coroutine.py();
    let mut result = ptr::null_mut();
    // SAFETY: valid references and a place for the result, which is a new reference unless there is an error. Then an
    // exception is set, and normalized it is an instance; its traceback is kept apart until here.
    unsafe {
        match ffi::PyIter_Send(coroutine.as_ptr(), value.as_ptr(), &raw mut result) {
            ffi::PySendResult::PYGEN_NEXT => Sent::Yielded(Bound::from_owned_ptr(py, result)),
            ffi::PySendResult::PYGEN_RETURN => Sent::Ended(Ok(Bound::from_owned_ptr(py, result).unbind())),
            ffi::PySendResult::PYGEN_ERROR => {
                let (mut class, mut error, mut traceback) = (ptr::null_mut(), ptr::null_mut(), ptr::null_mut());
                #[allow(deprecated, reason = "what replaces them came with 3.12")]
                {
                    ffi::PyErr_Fetch(&raw mut class, &raw mut error, &raw mut traceback);
                    ffi::PyErr_NormalizeException(&raw mut class, &raw mut error, &raw mut traceback);
                }
                if !traceback.is_null() {
                    ffi::PyException_SetTraceback(error, traceback);
                }
                ffi::Py_XDECREF(class);
                ffi::Py_XDECREF(traceback);
                Sent::Ended(Err(Bound::from_owned_ptr(py, error).cast_into_unchecked::<PyBaseException>().unbind()))
            }
        }
    }
}

/// A coroutine that returns while it is asked to end was cancelled, as any task of asyncio's.
fn cancelled_at_the_end(kit: &Kit, branch: &Bound<'_, PyAny>, outcome: Came) -> Came {
    let value = outcome?;
    let message = {
        let mut data = cell(kit, branch).borrow_mut();
        if !mem::take(&mut data.must_cancel) {
            return Ok(value);
        }
        data.message.take()
    };
    Err(cancelled_error(branch.py(), message).into_value(branch.py()))
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
        error = Some(cancelled_error(py, message));
    }
    Some((coroutine, error.map_or_else(|| Input::nothing(py), Input::Throw)))
}

/// Made at once: it is raised for certain, and the lazy form costs three times as much.
pub(super) fn cancelled_error(py: Python<'_>, message: Option<Py<PyAny>>) -> PyErr {
    let class = py.get_type::<CancelledError>();
    match message.map_or_else(|| class.call0(), |message| class.call1((message,))) {
        Ok(error) => PyErr::from_value(error),
        Err(error) => error,
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
pub(super) fn settled(branch: &Bound<'_, PyAny>, outcome: Came) -> PyResult<()> {
    let py = branch.py();
    let kit = kit(py)?;
    let (status, passes) = match &outcome {
        Ok(value) => (Status::Returned(value.clone_ref(py)), None),
        Err(error) => {
            let raised = error.bind(py);
            let is_failure = raised.is_instance_of::<PyException>(); // asked first: it answers the other questions too
            let passes = (!is_failure && ends_the_loop(raised)).then(|| PyErr::from_value(raised.clone().into_any()));
            let error = error.clone_ref(py).into_any();
            let is_cancelled = !is_failure && raised.is_instance_of::<CancelledError>();
            (if is_cancelled { Status::Cancelled(Some(error)) } else { Status::Raised(error) }, passes)
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
            split.get().told(py);
            schedule(split, branch, &callback, &context);
        }
        Split::ended(split, index, outcome);
    }
    passes.map_or(Ok(()), Err)
}

/// The two exceptions that asyncio lets out of the loop as well.
fn ends_the_loop(error: &Bound<'_, PyBaseException>) -> bool {
    error.is_instance_of::<PyKeyboardInterrupt>() || error.is_instance_of::<PySystemExit>()
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

/// The split asks a branch to end.
///
/// A branch that waits for a plain future is queued with its cancellation at once, instead of being told by the future that
/// it was cancelled: the same turn of the loop, one handle for all of them.
pub(super) fn cancel_by_split(branch: &Bound<'_, PyAny>, message: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
    let py = branch.py();
    let kit = kit(py)?;
    if overrides_cancel(branch)? {
        // As others do it who cancel tasks; a shield may stand there.
        let name = intern!(py, "cancel");
        return match message {
            Some(message) => branch.call_method1(name, (message,)),
            None => branch.call_method0(name),
        }
        .map(drop);
    }
    let future = cell(kit, branch).borrow().waiting_for.as_ref().map(|future| future.clone_ref(py).into_bound(py));
    if let Some(future) = future
        && future.get_type().is(kit.future.bind(py))
        // Where it is no callback any more, its call is on the way.
        && future.call_method1(intern!(py, "remove_done_callback"), (branch,))?.is_truthy()?
    {
        let kept = message.filter(|message| !message.is_none()).map(|message| message.clone().unbind());
        pass_cancel_on(&future, kept.as_ref())?;
        let error = cancelled_error(py, kept);
        let waited = {
            let mut data = cell(kit, branch).borrow_mut();
            data.cancelling += 1;
            data.pending_error = Some(error);
            data.waiting_for.take()
        };
        drop(waited);
        queue(kit, branch);
        return Ok(());
    }
    cancel(branch, message).map(drop)
}

/// Whether somebody has put a `cancel` on the branch itself.
fn overrides_cancel(branch: &Bound<'_, PyAny>) -> PyResult<bool> {
    // SAFETY: fields of a live object and its type; an offset above zero is a place in the object for its dict.
    let dict = unsafe {
        match (*branch.get_type_ptr()).tp_dictoffset {
            0 => return Ok(false),
            offset if offset > 0 => *branch.as_ptr().byte_offset(offset).cast::<*mut ffi::PyObject>(),
            _ => branch.getattr(intern!(branch.py(), "__dict__"))?.as_ptr(),
        }
    };
    if dict.is_null() {
        return Ok(false);
    }
    // SAFETY: the branch holds its dict.
    unsafe { Bound::from_borrowed_ptr(branch.py(), dict) }.contains(intern!(branch.py(), "cancel"))
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

/// Ends a branch by what happened in a callback of its.
pub(super) fn ended_by(branch: &Bound<'_, PyAny>, error: PyErr) -> PyResult<()> {
    let py = branch.py();
    let split = with(branch, |data| data.split.as_ref().map(|split| split.clone_ref(py)))?;
    let Some(split) = split else { return Ok(()) };
    let split = split.bind(py);
    let outcome = {
        let _seat = seat(split.get().event_loop(py));
        settled(branch, Err(error.into_value(py)))
    };
    Split::after_callback(split, outcome)
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
    let event_loop = split.get().event_loop(py);
    let outcome = match seat(event_loop) {
        Ok(_seat) => step_entered(branch, event_loop),
        Err(error) => settled(branch, Err(error.into_value(py))),
    };
    Split::after_callback(split, outcome)
}
