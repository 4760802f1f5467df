//! The type of branches: its methods, attributes and slots, as the interpreter calls them.
//!
//! Every public method of `asyncio.Task` is here, and every private name that libraries read, since the base of a branch is
//! never initialised and must not answer. What they do is `branch.rs`'s.
#![allow(unsafe_code, reason = "a type that derives from asyncio.Task cannot be made with #[pyclass]")]

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;

use pyo3::exceptions::{PyAttributeError, PyImportError, PyRuntimeError, PyTypeError};
use pyo3::ffi;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBool, PyDict, PyList, PyString, PyTuple, PyType};

use super::branch::{KIT, Kit, Status, Tail, cancel, cancelled_error, cell, copy_context, ended_by, kit, wake, with};
use super::current::Current;
use super::errors::{CancelledError, TaskExecutionError};

/// Runs `body` for the interpreter, which has attached this thread, also when it is about to end.
fn attached<R>(body: impl FnOnce(Python<'_>) -> R) -> R {
    // SAFETY: slots and methods are called by a thread that is attached. Not `attach`: it refuses while the interpreter ends.
    unsafe { Python::attach_unchecked(body) }
}

/// Runs `body` for the interpreter, with panics and errors turned into Python exceptions.
fn guarded<T>(failed: T, body: impl FnOnce(Python<'_>) -> PyResult<T>) -> T {
    attached(|py| {
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
unsafe fn borrowed(py: Python<'_>, object: Object) -> Bound<'_, PyAny> {
    // SAFETY: as the caller promises.
    unsafe { Bound::from_borrowed_ptr(py, object) }
}

pub(super) unsafe extern "C" fn woken(branch: Object, arguments: *const Object, count: usize, _: Object) -> Object {
    guarded(ptr::null_mut(), |py| {
        // SAFETY: plain arithmetic.
        if unsafe { ffi::PyVectorcall_NARGS(count) } != 1 {
            return Err(PyTypeError::new_err("a branch is called with the future it waited for"));
        }
        // SAFETY: the interpreter passes valid references, and `count` says there is one argument.
        let (branch, future) = unsafe { (borrowed(py, branch), borrowed(py, *arguments)) };
        let outcome = catch_unwind(AssertUnwindSafe(|| wake(&branch, &future)));
        if let Ok(outcome) = outcome {
            outcome?;
        } else {
            let panic = TaskExecutionError::new_err("panic: in a branch (a bug in cano, please report it)");
            ended_by(&branch, panic)?;
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
                // SAFETY: the interpreter's calling convention of `METH_FASTCALL | METH_KEYWORDS`.
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
/// The arguments are those of a `METH_FASTCALL | METH_KEYWORDS` call.
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
    PyBool::new(py, value).to_owned().into_any()
}

/// `asyncio.base_tasks` formats stacks for any task that has `_coro`.
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
        Status::Raised(error) | Status::Cancelled(Some(error)) => Err(PyErr::from_value(error.bind(py).clone())),
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
        let callback = {
            let kit = kit(py)?;
            let mut data = cell(kit, branch).borrow_mut();
            if matches!(data.status, Status::Pending) {
                data.callbacks.push((callback, kept));
                return Ok(none(py));
            }
            callback
        };
        let options = PyDict::new(py);
        options.set_item(intern!(py, "context"), context)?;
        let event_loop = loop_of(branch)?;
        event_loop.call_method(intern!(py, "call_soon"), (callback, branch), Some(&options))?;
        Ok(none(py))
    };
    remove_done_callback = c"remove_done_callback" => |branch, arguments| {
        let py = branch.py();
        let wanted = arguments.required(0, "fn")?;
        let callbacks = with(branch, |data| mem::take(&mut data.callbacks))?;
        let (mut kept, mut removed, mut outcome) = (Vec::new(), 0_usize, Ok(()));
        for (callback, context) in callbacks {
            match outcome.as_ref().map_or(Ok(false), |()| callback.bind(py).eq(wanted)) {
                Ok(true) => removed += 1,
                Ok(false) => kept.push((callback, context)),
                Err(error) => {
                    kept.push((callback, context));
                    outcome = Err(error);
                }
            }
        }
        with(branch, |data| { kept.append(&mut data.callbacks); data.callbacks = kept; })?;
        outcome?;
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
        Ok(cancelled_error(py, message).into_value(py).into_any().into_bound(py))
    };
}

fn coroutine_of<'py>(branch: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    let py = branch.py();
    let coroutine = with(branch, |data| data.coroutine.as_ref().map(|coroutine| coroutine.clone_ref(py)))?;
    Ok(coroutine.map_or_else(|| none(py), |coroutine| coroutine.into_bound(py)))
}

fn loop_of<'py>(branch: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    let py = branch.py();
    Ok(with(branch, |data| data.event_loop.clone_ref(py))?.into_bound(py))
}

fn name_of<'py>(branch: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyString>> {
    let py = branch.py();
    let (name, task_name, index) = with(branch, |data| {
        let name = data.name.as_ref().map(|name| name.clone_ref(py));
        (name, data.task_name.clone_ref(py), data.index)
    })?;
    match name {
        Some(name) => Ok(name.into_bound(py)),
        None => Ok(PyString::new(py, &format!("{}[{index}]", task_name.bind(py).to_cow()?))),
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
            _ => return Err(PyAttributeError::new_err("attribute cannot be changed")),
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
        let wait = WAIT
            .get_or_try_init(py, || Ok::<_, PyErr>(py.import("cano._branches")?.getattr("await_branch")?.unbind()))?;
        Ok(wait.bind(py).call1((branch,))?.into_ptr())
    })
}

unsafe extern "C" fn traverse(branch: Object, visit: ffi::visitproc, arg: *mut c_void) -> c_int {
    // SAFETY: the collector's thread is attached; nothing but the cell is looked at.
    let Some(kit) = KIT.get(unsafe { Python::assume_attached() }).map(ptr::from_ref) else { return 0 };
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
            data.split.as_ref().map(Py::as_ptr),
            data.coroutine.as_ref().map(Py::as_ptr),
            Some(data.context.as_ptr()),
            Some(data.event_loop.as_ptr()),
            data.waiting_for.as_ref().map(Py::as_ptr),
            data.message.as_ref().map(Py::as_ptr),
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
    attached(|py| {
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
            // A negative offset says that the interpreter keeps it elsewhere: then the base has to look.
            let used = |offset: ffi::Py_ssize_t| {
                offset < 0 || (offset > 0 && !(*branch.byte_offset(offset).cast::<Object>()).is_null())
            };
            if !used((*class).tp_weaklistoffset) && !used((*class).tp_dictoffset) {
                for offset in kit.base_references {
                    ffi::Py_XDECREF(branch.byte_add(offset).cast::<Object>().read());
                }
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
    pub(super) fn make(py: Python<'_>) -> PyResult<Kit> {
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
            base_references: Self::base_references(py, &base, base_size)?,
            current: Current::find(py)?,
            future: py.import("_asyncio")?.getattr("Future")?.unbind(),
            context_keyword: PyTuple::new(py, ["context"])?.unbind(),
        })
    }

    /// Looks for the coroutine and the context of a real task in its memory, since no header names their places.
    fn base_references(py: Python<'_>, base: &Bound<'_, PyType>, base_size: usize) -> PyResult<[usize; 2]> {
        let scratch = py.import("cano._branches")?.getattr("scratch_task")?.call1((base,))?;
        let (task, coroutine, context): (Bound<'_, PyAny>, Bound<'_, PyAny>, Bound<'_, PyAny>) = scratch.extract()?;
        let place = |wanted: &Bound<'_, PyAny>| {
            (size_of::<ffi::PyObject>()..base_size)
                .step_by(size_of::<usize>())
                // SAFETY: whole words inside an object of `base_size` bytes.
                .find(|offset| unsafe { task.as_ptr().byte_add(*offset).cast::<Object>().read() } == wanted.as_ptr())
                .ok_or_else(|| PyImportError::new_err("asyncio.Task does not look as expected"))
        };
        Ok([place(&coroutine)?, place(&context)?])
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
        let member = |name: &'static CStr, at: usize| ffi::PyMemberDef {
            name: name.as_ptr(),
            type_code: ffi::Py_T_PYSSIZET,
            offset: at.cast_signed(),
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
            flags: flags as c_uint,
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
