//! `Branch`: a task of our own, in the sense of asyncio's "Extending asyncio" page.
//!
//! Model. A branch starts its coroutine inside the parent's step and stays the same object from the first step to the last:
//! it is `current_task()` while its coroutine runs, has a context and cancel counters of its own, and is itself the
//! done-callback of whatever future its coroutine waits for. Nothing is scheduled to start it and nothing to report its end.
//!
//! The type derives from `asyncio.Task`, so that `isinstance` says what it is, but the base is never initialised: its part of
//! the object stays zeroed and every public method, `__repr__` and the private names that libraries read are overridden. Our
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
#![allow(unsafe_code, reason = "a type that derives from asyncio.Task cannot be made with #[pyclass]")]

use std::cell::RefCell;
use std::ffi::{c_char, c_int, c_void};
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::{PoisonError, RwLock};

use pyo3::exceptions::{PyImportError, PyRuntimeError, PyTypeError};
use pyo3::ffi;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyList, PyString, PyTuple, PyType};

use super::errors::{CancelledError, TaskExecutionError};
use super::run::{Input, Step, step};
use super::split::Split;

/// How a branch ended.
enum Status {
    Pending,
    Returned(Py<PyAny>),
    Raised(Py<PyAny>),
    Cancelled(Option<Py<PyAny>>),
}

/// What a branch owns.
struct Data {
    split: Option<Py<Split>>,
    index: usize,
    coroutine: Option<Py<PyAny>>,
    context: Py<PyAny>,
    /// The future that wakes it; None while it runs or is queued.
    waiting_for: Option<Py<PyAny>>,
    /// What the next step throws in: a future's or a protocol error.
    pending_error: Option<PyErr>,
    /// A cancel that could not be passed on to a future.
    must_cancel: bool,
    message: Option<Py<PyAny>>,
    cancelling: u32,
    /// Set by `__await__`, cleared by the task that awaits this branch.
    blocking: bool,
    status: Status,
    callbacks: Vec<(Py<PyAny>, Py<PyAny>)>,
    name: Option<Py<PyString>>,
}

/// The object behind the base: what the interpreter calls, then the data.
#[repr(C)]
struct Tail {
    vectorcall: ffi::vectorcallfunc,
    cell: RefCell<Data>,
}

/// The type and the functions of asyncio that a step needs; made once.
struct Kit {
    class: Py<PyType>,
    base: *mut ffi::PyTypeObject,
    /// Where `Tail` stands in the object.
    offset: usize,
    enter: Py<PyAny>,
    leave: Py<PyAny>,
    context_keyword: Py<PyTuple>,
}

// SAFETY: `base` is `asyncio.Task`, which `class` keeps alive; it is only read.
unsafe impl Send for Kit {}
// SAFETY: as above.
unsafe impl Sync for Kit {}

static KIT: PyOnceLock<Kit> = PyOnceLock::new();

fn kit(py: Python<'_>) -> PyResult<&Kit> {
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

fn cell<'a>(kit: &Kit, branch: &'a Bound<'_, PyAny>) -> &'a RefCell<Data> {
    debug_assert!(branch.get_type().is(kit.class.bind(branch.py())));
    // SAFETY: only objects of `class` get here: methods and slots of a type are called with its instances (it cannot be
    // derived from), and the rest of this crate passes what `new` made. `new` writes the tail before the object is seen.
    unsafe { &(*branch.as_ptr().byte_add(kit.offset).cast::<Tail>()).cell }
}

fn with<R>(branch: &Bound<'_, PyAny>, access: impl FnOnce(&mut Data) -> R) -> PyResult<R> {
    let kit = kit(branch.py())?;
    Ok(access(&mut cell(kit, branch).borrow_mut()))
}

/// Makes a branch that has not run yet.
pub(super) fn new<'py>(
    split: &Bound<'py, Split>,
    index: usize,
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
        pending_error: None,
        must_cancel: false,
        message: None,
        cancelling: 0,
        blocking: false,
        status: Status::Pending,
        callbacks: Vec::new(),
        name: None,
    };
    // SAFETY: `tp_alloc` of a GC type gives a zeroed, tracked object of `basicsize`, which reserves `Tail` at `offset`. No
    // Python runs between the allocation and the write (the collector may only run inside the allocation).
    unsafe {
        let class = kit.class.as_ptr().cast::<ffi::PyTypeObject>();
        let object = ffi::PyType_GenericAlloc(class, 0);
        if object.is_null() {
            return Err(PyErr::fetch(py));
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
            settled(branch, came)
        }
    }
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

fn cancelled_error(message: Option<Py<PyAny>>) -> PyErr {
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
    let context = cell(kit, branch).borrow().context.clone_ref(py);
    // SAFETY: a method call with two positional arguments (the first is the object) and one keyword.
    let added = unsafe {
        let arguments = [future.as_ptr(), branch.as_ptr(), context.as_ptr()];
        let name = intern!(py, "add_done_callback").as_ptr();
        let added = ffi::PyObject_VectorcallMethod(name, arguments.as_ptr(), 2, kit.context_keyword.as_ptr());
        Bound::from_owned_ptr_or_err(py, added)
    };
    drop(added?);
    let (cancel, message) = {
        let mut data = cell(kit, branch).borrow_mut();
        data.waiting_for = Some(future.clone().unbind());
        (data.must_cancel, data.message.as_ref().map(|message| message.clone_ref(py)))
    };
    if cancel && pass_cancel_on(future, message.as_ref())? {
        let mut data = cell(kit, branch).borrow_mut();
        data.must_cancel = false;
    }
    Ok(())
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
fn settled(branch: &Bound<'_, PyAny>, came: Step<'_>) -> PyResult<()> {
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
fn wake(branch: &Bound<'_, PyAny>, future: &Bound<'_, PyAny>) -> PyResult<()> {
    let py = branch.py();
    let kit = kit(py)?;
    let (waited, split) = {
        let mut data = cell(kit, branch).borrow_mut();
        if !matches!(data.status, Status::Pending) || !data.waiting_for.as_ref().is_some_and(|own| own.is(future)) {
            return Ok(());
        }
        (data.waiting_for.take(), data.split.as_ref().map(|split| split.clone_ref(py)))
    };
    drop(waited);
    let Some(split) = split else { return Ok(()) };
    // A failed future's exception is thrown in, as a Task does: hand-written awaitables rely on it.
    if let Err(error) = future.call_method0(intern!(py, "result")) {
        cell(kit, branch).borrow_mut().pending_error = Some(error);
    }
    let split = split.bind(py);
    let outcome = step_entered(branch, split.get().event_loop(py));
    Split::after_callback(split);
    outcome
}

// --- what the interpreter calls ---------------------------------------------------------------------------------------

/// Runs `body` for the interpreter: attached, with panics and errors turned into Python exceptions.
fn guarded<T>(failed: T, body: impl FnOnce(Python<'_>) -> PyResult<T>) -> T {
    Python::attach(|py| {
        let outcome = catch_unwind(AssertUnwindSafe(|| body(py))).unwrap_or_else(|_| {
            Err(TaskExecutionError::new_err("panic: in a branch (a bug in cano, please report it)"))
        });
        match outcome {
            Ok(value) => value,
            Err(error) => {
                error.restore(py);
                failed
            }
        }
    })
}

type Object = *mut ffi::PyObject;

/// The object that the interpreter passes, borrowed for the call.
///
/// # Safety
/// `object` is a valid reference for as long as the call lasts.
unsafe fn borrowed<'py>(py: Python<'py>, object: Object) -> Bound<'py, PyAny> {
    // SAFETY: as the caller promises.
    unsafe { Bound::from_borrowed_ptr(py, object) }
}

unsafe extern "C" fn woken(branch: Object, arguments: *const Object, count: usize, _: Object) -> Object {
    guarded(ptr::null_mut(), |py| {
        // SAFETY: plain arithmetic.
        if unsafe { ffi::PyVectorcall_NARGS(count) } != 1 {
            return Err(PyTypeError::new_err("a branch is called with the future it waited for"));
        }
        // SAFETY: the interpreter passes valid references, and `count` says there is one argument.
        let (branch, future) = unsafe { (borrowed(py, branch), borrowed(py, *arguments)) };
        let outcome = catch_unwind(AssertUnwindSafe(|| wake(&branch, &future)));
        match outcome {
            Ok(outcome) => outcome?,
            Err(_) => {
                let panic = TaskExecutionError::new_err("panic: in a branch (a bug in cano, please report it)");
                settled(&branch, Step::Raised(panic))?;
            }
        }
        Ok(py.None().into_ptr())
    })
}

/// A method: the branch, its positional arguments and its keywords.
type Method = for<'py> fn(&Bound<'py, PyAny>, &Arguments<'py>) -> PyResult<Bound<'py, PyAny>>;

struct Arguments<'py> {
    positional: Vec<Bound<'py, PyAny>>,
    named: Vec<(String, Bound<'py, PyAny>)>,
}

impl<'py> Arguments<'py> {
    /// The argument at a position, or with this name.
    fn pick(&self, at: usize, name: &str) -> Option<&Bound<'py, PyAny>> {
        self.positional.get(at).or_else(|| self.named.iter().find(|(known, _)| known == name).map(|(_, value)| value))
    }

    fn required(&self, at: usize, name: &str) -> PyResult<&Bound<'py, PyAny>> {
        self.pick(at, name).ok_or_else(|| PyTypeError::new_err(format!("missing required argument: '{name}'")))
    }
}

/// One C function per method, since the interpreter passes it no name.
macro_rules! methods {
    ($($name:ident = $python:literal => $body:expr;)*) => {
        $(
            unsafe extern "C" fn $name(
                branch: Object,
                arguments: *const Object,
                count: ffi::Py_ssize_t,
                keywords: Object,
            ) -> Object {
                // SAFETY: the interpreter's calling convention of METH_FASTCALL | METH_KEYWORDS.
                unsafe { call_method($body, branch, arguments, count, keywords) }
            }
        )*
        fn methods() -> Vec<ffi::PyMethodDef> {
            vec![
                $(ffi::PyMethodDef {
                    ml_name: $python.as_ptr(),
                    ml_meth: ffi::PyMethodDefPointer { PyCFunctionFastWithKeywords: $name },
                    ml_flags: ffi::METH_FASTCALL | ffi::METH_KEYWORDS,
                    ml_doc: ptr::null(),
                },)*
                ffi::PyMethodDef::zeroed(),
            ]
        }
    };
}

/// # Safety
/// The arguments are those of a METH_FASTCALL | METH_KEYWORDS call.
unsafe fn call_method(
    method: Method,
    branch: Object,
    arguments: *const Object,
    count: ffi::Py_ssize_t,
    keywords: Object,
) -> Object {
    guarded(ptr::null_mut(), |py| {
        // SAFETY: as the caller promises: `count` positional arguments, then one for each keyword.
        let (branch, positional, named) = unsafe {
            let at = |index: usize| borrowed(py, *arguments.add(index));
            let count = usize::try_from(count).unwrap_or(0);
            let positional = (0..count).map(at).collect();
            let mut named = Vec::new();
            if !keywords.is_null() {
                for (index, name) in borrowed(py, keywords).cast_into::<PyTuple>()?.iter().enumerate() {
                    named.push((name.extract::<String>()?, at(count + index)));
                }
            }
            (borrowed(py, branch), positional, named)
        };
        Ok(method(&branch, &Arguments { positional, named })?.into_ptr())
    })
}

fn none(py: Python<'_>) -> Bound<'_, PyAny> {
    py.None().into_bound(py)
}

fn boolean(py: Python<'_>, value: bool) -> Bound<'_, PyAny> {
    pyo3::types::PyBool::new(py, value).to_owned().into_any()
}

/// "asyncio.base_tasks" formats stacks for any task that has `_coro`.
fn stack<'py>(branch: &Bound<'py, PyAny>, name: &str, arguments: &[&Bound<'py, PyAny>]) -> PyResult<Bound<'py, PyAny>> {
    let py = branch.py();
    let mut all = vec![branch.clone()];
    all.extend(arguments.iter().map(|argument| (*argument).clone()));
    py.import("asyncio.base_tasks")?.getattr(name)?.call1(PyTuple::new(py, all)?)
}

/// What `result()` gives: the value, or the exception that it raises.
fn result<'py>(branch: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    let py = branch.py();
    with(branch, |data| match &data.status {
        Status::Pending => Err(invalid_state(py, "Result is not set.")),
        Status::Returned(value) => Ok(value.clone_ref(py).into_bound(py)),
        Status::Raised(error) => Err(PyErr::from_value(error.bind(py).clone())),
        Status::Cancelled(Some(error)) => Err(PyErr::from_value(error.bind(py).clone())),
        Status::Cancelled(None) => Err(CancelledError::new_err(())),
    })?
}

fn invalid_state(py: Python<'_>, text: &str) -> PyErr {
    match py.import("asyncio").and_then(|asyncio| asyncio.getattr("InvalidStateError")?.call1((text,))) {
        Ok(error) => PyErr::from_value(error),
        Err(error) => error,
    }
}

methods! {
    cancel_method = c"cancel" => |branch, arguments| {
        cancel(branch, arguments.pick(0, "msg")).map(|asked| boolean(branch.py(), asked))
    };
    uncancel = c"uncancel" => |branch, _| {
        let left = with(branch, |data| { data.cancelling = data.cancelling.saturating_sub(1); data.cancelling })?;
        Ok(left.into_pyobject(branch.py())?.into_any())
    };
    cancelling = c"cancelling" => |branch, _| {
        Ok(with(branch, |data| data.cancelling)?.into_pyobject(branch.py())?.into_any())
    };
    done = c"done" => |branch, _| {
        Ok(boolean(branch.py(), with(branch, |data| !matches!(data.status, Status::Pending))?))
    };
    cancelled = c"cancelled" => |branch, _| {
        Ok(boolean(branch.py(), with(branch, |data| matches!(data.status, Status::Cancelled(_)))?))
    };
    result_method = c"result" => |branch, _| result(branch);
    exception = c"exception" => |branch, _| {
        let py = branch.py();
        let raised = with(branch, |data| match &data.status {
            Status::Raised(error) => Some(error.clone_ref(py)),
            _ => None,
        })?;
        match raised {
            Some(error) => Ok(error.into_bound(py)),
            None => result(branch).map(|_| none(py)).map_err(|error| {
                if error.is_instance_of::<CancelledError>(py) { error } else { invalid_state(py, "Exception is not set.") }
            }),
        }
    };
    add_done_callback = c"add_done_callback" => |branch, arguments| {
        let py = branch.py();
        let callback = arguments.required(0, "fn")?.clone().unbind();
        let context = match arguments.pick(1, "context") {
            Some(context) if !context.is_none() => context.clone(),
            _ => copy_context(py)?,
        };
        let kept = context.clone().unbind();
        let (callback, split) = {
            let kit = kit(py)?;
            let mut data = cell(kit, branch).borrow_mut();
            if matches!(data.status, Status::Pending) {
                data.callbacks.push((callback, kept));
                return Ok(none(py));
            }
            (callback, data.split.as_ref().map(|split| split.clone_ref(py)))
        };
        let options = PyDict::new(py);
        options.set_item(intern!(py, "context"), context)?;
        let event_loop = match split {
            Some(split) => split.bind(py).get().event_loop(py).clone(),
            None => py.import("asyncio")?.call_method0("get_running_loop")?,
        };
        event_loop.call_method(intern!(py, "call_soon"), (callback, branch), Some(&options))?;
        Ok(none(py))
    };
    remove_done_callback = c"remove_done_callback" => |branch, arguments| {
        let py = branch.py();
        let wanted = arguments.required(0, "fn")?;
        let callbacks = with(branch, |data| mem::take(&mut data.callbacks))?;
        let before = callbacks.len();
        let mut kept = Vec::new();
        for (callback, context) in callbacks {
            if !callback.bind(py).eq(wanted)? {
                kept.push((callback, context));
            }
        }
        let removed = before - kept.len();
        with(branch, |data| { kept.append(&mut data.callbacks); data.callbacks = kept; })?;
        Ok(removed.into_pyobject(py)?.into_any())
    };
    get_loop = c"get_loop" => |branch, _| loop_of(branch);
    get_coro = c"get_coro" => |branch, _| coroutine_of(branch);
    get_context = c"get_context" => |branch, _| {
        let py = branch.py();
        Ok(with(branch, |data| data.context.clone_ref(py))?.into_bound(py))
    };
    get_name = c"get_name" => |branch, _| Ok(name_of(branch)?.into_any());
    set_name = c"set_name" => |branch, arguments| {
        let name = arguments.required(0, "value")?.str()?.unbind();
        let old = with(branch, |data| data.name.replace(name))?;
        drop(old);
        Ok(none(branch.py()))
    };
    get_stack = c"get_stack" => |branch, arguments| {
        let limit = arguments.pick(0, "limit").cloned().unwrap_or_else(|| none(branch.py()));
        stack(branch, "_task_get_stack", &[&limit])
    };
    print_stack = c"print_stack" => |branch, arguments| {
        let absent = none(branch.py());
        let limit = arguments.pick(0, "limit").unwrap_or(&absent);
        stack(branch, "_task_print_stack", &[limit, arguments.pick(1, "file").unwrap_or(&absent)])
    };
    set_result = c"set_result" => |_, _| Err(PyRuntimeError::new_err("Task does not support set_result operation"));
    set_exception = c"set_exception" => |_, _| Err(PyRuntimeError::new_err("Task does not support set_exception operation"));
    make_cancelled_error = c"_make_cancelled_error" => |branch, _| {
        let py = branch.py();
        let message = with(branch, |data| data.message.as_ref().map(|message| message.clone_ref(py)))?;
        Ok(cancelled_error(message).into_value(py).into_any().into_bound(py))
    };
}

fn coroutine_of<'py>(branch: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    let py = branch.py();
    let coroutine = with(branch, |data| data.coroutine.as_ref().map(|coroutine| coroutine.clone_ref(py)))?;
    Ok(coroutine.map_or_else(|| none(py), |coroutine| coroutine.into_bound(py)))
}

fn loop_of<'py>(branch: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    let py = branch.py();
    match with(branch, |data| data.split.as_ref().map(|split| split.clone_ref(py)))? {
        Some(split) => Ok(split.bind(py).get().event_loop(py).clone()),
        None => py.import("asyncio")?.call_method0("get_running_loop"),
    }
}

fn name_of<'py>(branch: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyString>> {
    let py = branch.py();
    let (name, split, index) = with(branch, |data| {
        let name = data.name.as_ref().map(|name| name.clone_ref(py));
        (name, data.split.as_ref().map(|split| split.clone_ref(py)), data.index)
    })?;
    match (name, split) {
        (Some(name), _) => Ok(name.into_bound(py)),
        (None, Some(split)) => Ok(PyString::new(py, &split.bind(py).get().name_of_branch(py, index)?)),
        (None, None) => Ok(PyString::new(py, &format!("branch[{index}]"))),
    }
}

/// A private attribute that libraries read.
type Getter = for<'py> fn(&Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>>;
type Setter = fn(&Bound<'_, PyAny>, &Bound<'_, PyAny>) -> PyResult<()>;

struct Attribute {
    name: &'static str,
    get: Getter,
    set: Option<Setter>,
}

fn state_name(branch: &Bound<'_, PyAny>) -> PyResult<&'static str> {
    with(branch, |data| match data.status {
        Status::Pending => "PENDING",
        Status::Cancelled(_) => "CANCELLED",
        Status::Returned(_) | Status::Raised(_) => "FINISHED",
    })
}

static ATTRIBUTES: [Attribute; 14] = [
    Attribute {
        name: "_asyncio_future_blocking\0",
        get: |branch| Ok(boolean(branch.py(), with(branch, |data| data.blocking)?)),
        set: Some(|branch, value| {
            let blocking = value.is_truthy()?;
            with(branch, |data| data.blocking = blocking)
        }),
    },
    Attribute {
        name: "_must_cancel\0",
        get: |branch| Ok(boolean(branch.py(), with(branch, |data| data.must_cancel)?)),
        set: None,
    },
    Attribute {
        name: "_fut_waiter\0",
        get: |branch| {
            let py = branch.py();
            let future = with(branch, |data| data.waiting_for.as_ref().map(|future| future.clone_ref(py)))?;
            Ok(future.map_or_else(|| none(py), |future| future.into_bound(py)))
        },
        set: None,
    },
    Attribute { name: "_loop\0", get: |branch| loop_of(branch), set: None },
    Attribute { name: "_coro\0", get: |branch| coroutine_of(branch), set: None },
    Attribute {
        name: "_state\0",
        get: |branch| Ok(PyString::intern(branch.py(), state_name(branch)?).into_any()),
        set: None,
    },
    Attribute {
        name: "_result\0",
        get: |branch| {
            let py = branch.py();
            let value = with(branch, |data| match &data.status {
                Status::Returned(value) => Some(value.clone_ref(py)),
                _ => None,
            })?;
            Ok(value.map_or_else(|| none(py), |value| value.into_bound(py)))
        },
        set: None,
    },
    Attribute {
        name: "_exception\0",
        get: |branch| {
            let py = branch.py();
            let error = with(branch, |data| match &data.status {
                Status::Raised(error) => Some(error.clone_ref(py)),
                _ => None,
            })?;
            Ok(error.map_or_else(|| none(py), |error| error.into_bound(py)))
        },
        set: None,
    },
    Attribute {
        name: "_callbacks\0",
        get: |branch| {
            let py = branch.py();
            let pairs = with(branch, |data| {
                data.callbacks
                    .iter()
                    .map(|(callback, context)| (callback.clone_ref(py), context.clone_ref(py)))
                    .collect::<Vec<_>>()
            })?;
            Ok(PyList::new(py, pairs)?.into_any())
        },
        set: None,
    },
    Attribute {
        name: "_cancel_message\0",
        get: |branch| {
            let py = branch.py();
            let message = with(branch, |data| data.message.as_ref().map(|message| message.clone_ref(py)))?;
            Ok(message.map_or_else(|| none(py), |message| message.into_bound(py)))
        },
        set: None,
    },
    Attribute { name: "_log_traceback\0", get: |branch| Ok(boolean(branch.py(), false)), set: Some(|_, _| Ok(())) },
    Attribute {
        name: "_log_destroy_pending\0",
        get: |branch| Ok(boolean(branch.py(), false)),
        set: Some(|_, _| Ok(())),
    },
    Attribute { name: "_source_traceback\0", get: |branch| Ok(none(branch.py())), set: None },
    Attribute {
        name: "_num_cancels_requested\0",
        get: |branch| Ok(with(branch, |data| data.cancelling)?.into_pyobject(branch.py())?.into_any()),
        set: None,
    },
];

unsafe extern "C" fn get_attribute(branch: Object, closure: *mut c_void) -> Object {
    guarded(ptr::null_mut(), |py| {
        // SAFETY: the interpreter passes an instance and the closure of `Kit::make`, an entry of `ATTRIBUTES`.
        let (branch, attribute) = unsafe { (borrowed(py, branch), &*closure.cast::<Attribute>()) };
        Ok((attribute.get)(&branch)?.into_ptr())
    })
}

unsafe extern "C" fn set_attribute(branch: Object, value: Object, closure: *mut c_void) -> c_int {
    guarded(-1, |py| {
        // SAFETY: as in `get_attribute`; `value` is null for a deletion.
        let (branch, attribute) = unsafe { (borrowed(py, branch), &*closure.cast::<Attribute>()) };
        match (attribute.set, value.is_null()) {
            // SAFETY: a valid reference, checked above.
            (Some(set), false) => set(&branch, &unsafe { borrowed(py, value) })?,
            _ => return Err(pyo3::exceptions::PyAttributeError::new_err("attribute cannot be changed")),
        }
        Ok(0)
    })
}

unsafe extern "C" fn repr(branch: Object) -> Object {
    guarded(ptr::null_mut(), |py| {
        // SAFETY: the interpreter passes an instance.
        let branch = unsafe { borrowed(py, branch) };
        let (name, coroutine) = (name_of(&branch)?, coroutine_of(&branch)?);
        let state = state_name(&branch)?.to_lowercase();
        let text = format!("<Branch {state} name='{}' coro={}>", name.to_cow()?, coroutine.repr()?.to_cow()?);
        Ok(PyString::new(py, &text).into_any().into_ptr())
    })
}

/// `await branch`: the steps of a future's iterator are written as a generator in Python, once.
unsafe extern "C" fn await_(branch: Object) -> Object {
    guarded(ptr::null_mut(), |py| {
        static WAIT: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
        // SAFETY: the interpreter passes an instance.
        let branch = unsafe { borrowed(py, branch) };
        let wait =
            WAIT.get_or_try_init(py, || Ok::<_, PyErr>(py.import("cano._tasks")?.getattr("await_branch")?.unbind()))?;
        Ok(wait.bind(py).call1((branch,))?.into_ptr())
    })
}

unsafe extern "C" fn traverse(branch: Object, visit: ffi::visitproc, arg: *mut c_void) -> c_int {
    let Some(kit) = Python::attach(|py| KIT.get(py).map(ptr::from_ref)) else { return 0 };
    // SAFETY: `kit` lives as long as the process; the base's part of the object is the base's to visit; the tail was written
    // by `new`, or is still zeroed if the collector runs inside the allocation, which `vectorcall` tells.
    unsafe {
        let kit = &*kit;
        if ffi::PyType_HasFeature(kit.base, ffi::Py_TPFLAGS_HEAPTYPE) == 0 {
            let seen = visit(ffi::Py_TYPE(branch).cast(), arg);
            if seen != 0 {
                return seen;
            }
        }
        if let Some(base) = (*kit.base).tp_traverse {
            let seen = base(branch, visit, arg);
            if seen != 0 {
                return seen;
            }
        }
        let tail = branch.byte_add(kit.offset).cast::<Tail>();
        if (*tail.cast::<usize>()) == 0 {
            return 0;
        }
        let Ok(data) = (*tail).cell.try_borrow() else { return 0 };
        let status = match &data.status {
            Status::Pending | Status::Cancelled(None) => None,
            Status::Returned(object) | Status::Raised(object) | Status::Cancelled(Some(object)) => {
                Some(object.as_ptr())
            }
        };
        let single = [
            data.split.as_ref().map(|split| split.as_ptr()),
            data.coroutine.as_ref().map(|object| object.as_ptr()),
            Some(data.context.as_ptr()),
            data.waiting_for.as_ref().map(|object| object.as_ptr()),
            data.message.as_ref().map(|object| object.as_ptr()),
            status,
        ];
        let callbacks = data.callbacks.iter().flat_map(|(callback, context)| [callback.as_ptr(), context.as_ptr()]);
        for object in single.into_iter().flatten().chain(callbacks) {
            let seen = visit(object, arg);
            if seen != 0 {
                return seen;
            }
        }
        0
    }
}

unsafe extern "C" fn clear(branch: Object) -> c_int {
    guarded(-1, |py| {
        let Some(kit) = KIT.get(py) else { return Ok(0) };
        // SAFETY: the interpreter passes an instance whose tail `new` has written.
        let taken = unsafe {
            let tail = branch.byte_add(kit.offset).cast::<Tail>();
            if *tail.cast::<usize>() == 0 {
                return Ok(0);
            }
            (*tail).cell.try_borrow_mut().ok().map(|mut data| {
                let status = mem::replace(&mut data.status, Status::Cancelled(None));
                let callbacks = mem::take(&mut data.callbacks);
                (
                    data.split.take(),
                    data.coroutine.take(),
                    data.waiting_for.take(),
                    data.message.take(),
                    status,
                    callbacks,
                )
            })
        };
        drop(taken);
        Ok(0)
    })
}

unsafe extern "C" fn dealloc(branch: Object) {
    Python::attach(|py| {
        let Some(kit) = KIT.get(py) else { return };
        // SAFETY: the last reference is gone. The tail is dropped once, before the base frees the object; a base that is a
        // static type (before 3.12) does not release its instances' heap type.
        unsafe {
            ffi::PyObject_GC_UnTrack(branch.cast());
            let class = ffi::Py_TYPE(branch);
            let tail = branch.byte_add(kit.offset).cast::<Tail>();
            if *tail.cast::<usize>() != 0 {
                ptr::drop_in_place(tail);
            }
            // The base's part is zeroed but for what anybody may add to an object: weak references and a `__dict__`.
            let used =
                |offset: ffi::Py_ssize_t| offset != 0 && !(*branch.byte_offset(offset).cast::<Object>()).is_null();
            if !used((*class).tp_weaklistoffset) && !used((*class).tp_dictoffset) {
                ffi::PyObject_GC_Del(branch.cast());
                ffi::Py_DECREF(class.cast());
                return;
            }
            let base_is_static = ffi::PyType_HasFeature(kit.base, ffi::Py_TPFLAGS_HEAPTYPE) == 0;
            if let Some(base) = (*kit.base).tp_dealloc {
                base(branch);
            }
            if base_is_static {
                ffi::Py_DECREF(class.cast());
            }
        }
    });
}

unsafe extern "C" {
    // pyo3-ffi links to another name before 3.12, which 3.11 does not export.
    fn PyVectorcall_Call(callable: Object, arguments: Object, keywords: Object) -> Object;
}

impl Kit {
    fn make(py: Python<'_>) -> PyResult<Kit> {
        let tasks = py.import("asyncio.tasks")?;
        let base = tasks.getattr("Task")?.cast_into::<PyType>()?;
        if base.getattr("__module__")?.extract::<String>()? != "_asyncio" {
            return Err(PyImportError::new_err("asyncio.Task is not the one written in C"));
        }
        let base_type = base.as_type_ptr();
        // SAFETY: a type object's size is a plain field.
        let base_size = usize::try_from(unsafe { (*base_type).tp_basicsize }).unwrap_or(0);
        let align = align_of::<Tail>();
        let offset = base_size.div_ceil(align) * align;
        let size = c_int::try_from(offset + size_of::<Tail>())
            .map_err(|_| PyImportError::new_err("asyncio.Task is too large"))?;
        let class = Self::class(py, &base, offset, size)?;
        Ok(Kit {
            class,
            base: base_type,
            offset,
            enter: tasks.getattr("_enter_task")?.unbind(),
            leave: tasks.getattr("_leave_task")?.unbind(),
            context_keyword: PyTuple::new(py, ["context"])?.unbind(),
        })
    }

    fn class(py: Python<'_>, base: &Bound<'_, PyType>, offset: usize, size: c_int) -> PyResult<Py<PyType>> {
        // The interpreter keeps pointers into both tables for as long as the type lives: for ever.
        let mut properties: Vec<ffi::PyGetSetDef> = ATTRIBUTES
            .iter()
            .map(|attribute| ffi::PyGetSetDef {
                name: attribute.name.as_ptr().cast::<c_char>(),
                get: Some(get_attribute),
                set: Some(set_attribute),
                doc: ptr::null(),
                closure: ptr::from_ref(attribute).cast_mut().cast::<c_void>(),
            })
            .collect();
        properties.push(ffi::PyGetSetDef::default());
        let properties = properties.leak();
        let vectorcall_offset = offset + mem::offset_of!(Tail, vectorcall);
        let member = |name: &'static std::ffi::CStr, at: usize| ffi::PyMemberDef {
            name: name.as_ptr(),
            type_code: ffi::Py_T_PYSSIZET,
            offset: at as ffi::Py_ssize_t,
            flags: ffi::Py_READONLY,
            doc: ptr::null(),
        };
        let members = vec![member(c"__vectorcalloffset__", vectorcall_offset), ffi::PyMemberDef::default()].leak();
        let methods = methods().leak();
        let slot = |slot: c_int, pointer: *mut c_void| ffi::PyType_Slot { slot, pfunc: pointer };
        let mut slots = [
            slot(ffi::Py_tp_dealloc, dealloc as *mut c_void),
            slot(ffi::Py_tp_traverse, traverse as *mut c_void),
            slot(ffi::Py_tp_clear, clear as *mut c_void),
            slot(ffi::Py_tp_repr, repr as *mut c_void),
            slot(ffi::Py_tp_iter, await_ as *mut c_void),
            slot(ffi::Py_am_await, await_ as *mut c_void),
            slot(ffi::Py_tp_call, PyVectorcall_Call as *mut c_void),
            slot(ffi::Py_tp_methods, methods.as_mut_ptr().cast()),
            slot(ffi::Py_tp_getset, properties.as_mut_ptr().cast()),
            slot(ffi::Py_tp_members, members.as_mut_ptr().cast()),
            slot(0, ptr::null_mut()),
        ];
        let flags = ffi::Py_TPFLAGS_DEFAULT
            | ffi::Py_TPFLAGS_HAVE_GC
            | ffi::Py_TPFLAGS_HAVE_VECTORCALL
            | ffi::Py_TPFLAGS_DISALLOW_INSTANTIATION;
        let mut spec = ffi::PyType_Spec {
            name: c"cano._core.Branch".as_ptr(),
            basicsize: size,
            itemsize: 0,
            flags: flags as std::ffi::c_uint,
            slots: slots.as_mut_ptr(),
        };
        let bases = PyTuple::new(py, [base])?;
        // SAFETY: the spec and its slots are valid for the call; what they point to lives for ever.
        let class = unsafe {
            let class = ffi::PyType_FromSpecWithBases(&raw mut spec, bases.as_ptr());
            Bound::from_owned_ptr_or_err(py, class)?
        };
        Ok(class.cast_into::<PyType>()?.unbind())
    }
}
