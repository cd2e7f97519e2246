#include "resized_dice.h"

#include "block.h"

namespace fastkd::gpu {

void resized_dice_forward(const ResizedDice& a, Stream stream) {
    resized_dice_forward(a, Launcher{static_cast<cudaStream_t>(stream)});
}
void resized_dice_backward(const ResizedDice& a, Stream stream) {
    resized_dice_backward(a, Launcher{static_cast<cudaStream_t>(stream)});
}

}  // namespace fastkd::gpu
