"""What other runtimes cannot read in an ONNX model, by the list in runtime_operators.txt."""

from pathlib import Path

import onnx

LETTERS = {"FLOAT": "f", "FLOAT16": "h", "INT32": "i", "INT64": "i", "BOOL": "b", "UINT8": "u"}
NAMES = ("TensorRT", "DirectML", "OpenVINO")
LINES = Path(__file__).with_name("runtime_operators.txt").read_text().splitlines()
TABLE = {line.split()[0]: line.split()[1:] for line in LINES if not line.startswith("#")}
CONSTANT = {  # inputs that TensorRT wants to be constant
    "Slice": (3,), "Squeeze": (1,), "Unsqueeze": (1,), "ReduceMin": (1,), "Pad": (3,), "TopK": (1,),
}


def unreadable(model):
    """A line for each node that some runtime lacks or reads differently; DirectML may lack some."""
    (opset,) = model.opset_import
    found = [] if not opset.domain and 9 <= opset.version <= 20 else [f"opset {opset}"]
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    types = {value.name: value.type.tensor_type.elem_type
             for value in (*inferred.value_info, *inferred.input, *inferred.output)}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    types |= {name: tensor.data_type for name, tensor in constants.items()}
    for node in model.graph.node:
        what = node.op_type
        if node.domain or what not in TABLE:
            found.append(f"{node.domain} {what} is not in the list")
            continue
        data = [node.input[what == "Where"], *(node.output if what == "Cast" else ())]
        names = {onnx.TensorProto.DataType.Name(types[name]) for name in data}
        found += [
            f"{runtime} has no {what} of {name}"
            for runtime, taken in zip(NAMES, TABLE[what]) for name in names
            if taken == "-" or not (taken.isdigit() or LETTERS.get(name, "?") in taken)
        ]
        given = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
        if what == "GridSample" and given["mode"] != b"bilinear":
            found.append(f"TensorRT reads GridSample {given} differently")
        if what == "Pad" and given.get("mode", b"constant") != b"constant":
            found.append(f"Pad {given}")
        if what == "DeformConv" and given["pads"][:2] != given["pads"][2:]:
            found.append(f"TensorRT has no DeformConv with pads {given['pads']}")
        if what == "TopK" and not given.get("sorted", 1):
            found.append("TensorRT has no TopK that does not sort")
        found += [
            f"TensorRT wants input {place} of {what} to be constant"
            for place in CONSTANT.get(what, ())
            if len(node.input) > place and node.input[place] not in {"", *constants}
        ]
    return sorted(set(found))
