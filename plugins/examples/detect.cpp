// Finds objects in a picture, a video or a camera.
//
//   c++ -std=c++17 -O2 detect.cpp -L../build -lodtrt_detector -Wl,-rpath,'$ORIGIN/../build' -ldl -o detect
//   ./detect ../../out/parts scene.ppm        a plan of TensorRT, which `odtrt build` makes
//   ffmpeg -i /dev/video0 -f image2pipe -c:v ppm - | ./detect ../../out/parts /dev/stdin
//
// With -DWITH_OPENCV and `pkg-config --cflags --libs opencv4`: whatever OpenCV opens, "0" for the first camera.
// A third argument names a library with a function `network` (odtrt_network), for a machine without a GPU.
#include <dlfcn.h>
#include <fstream>
#include <iostream>
#include <vector>
#include "../detector/odtrt_detector.h"

#ifdef WITH_OPENCV
#include <opencv2/videoio.hpp>
bool next(cv::VideoCapture &source, cv::Mat &memory, odtrt_image &image) {
  if (!source.read(memory)) return false;
  image = {sizeof image, memory.data, memory.rows, memory.cols, static_cast<int64_t>(memory.step), ODTRT_BGR8};
  return true;
}
#else
bool next(std::istream &source, std::vector<char> &memory, odtrt_image &image) {  // binary PPM pictures, one or more
  std::string kind, depth;
  if (!(source >> kind >> image.width >> image.height >> depth) || kind != "P6" || depth != "255") return false;
  memory.resize(size_t{3} * image.width * image.height);
  image.data = reinterpret_cast<uint8_t *>(memory.data());
  return source.ignore(1).read(memory.data(), static_cast<std::streamsize>(memory.size())).good();
}
#endif

int main(int count, char **words) {
  char error[500] = "usage: detect FOLDER SOURCE [NETWORK]";
  void *library = count > 3 ? dlopen(words[3], RTLD_NOW) : nullptr;
  const auto network = reinterpret_cast<odtrt_network>(library ? dlsym(library, "network") : nullptr);
  odtrt_detector_options options = {sizeof options, words[1], network, nullptr, nullptr, nullptr, 0};
  odtrt_detector *detector = nullptr;
  if (count < 3 || odtrt_detector_open(&options, &detector, error, sizeof error)) return std::cerr << error << '\n', 1;
  odtrt_detector_shape shape = {sizeof shape, 0, 0, 0, 0, 0, 0, 0};
  odtrt_detector_get_shape(detector, &shape);
  std::vector<odtrt_detection> found(static_cast<size_t>(shape.max_detections));
  odtrt_result result = {sizeof result, found.data(), shape.max_detections, 0, 0};
  odtrt_image image = {sizeof image, nullptr, 0, 0, 0, ODTRT_RGB8};
#ifdef WITH_OPENCV
  cv::Mat memory;
  cv::VideoCapture source = std::string(words[2]) == "0" ? cv::VideoCapture(0) : cv::VideoCapture(words[2]);
#else
  std::vector<char> memory;
  std::ifstream source(words[2], std::ios::binary);
#endif
  while (next(source, memory, image)) {
    if (odtrt_detector_infer(detector, &image, &result, error, sizeof error)) return std::cerr << error << '\n', 1;
    for (int i = 0; i < result.num_detections && found[i].score > 0.5f; ++i) {
      const odtrt_detection &one = found[i];  // box: ymin, xmin, ymax, xmax in pixels
      std::cout << odtrt_detector_class_name(detector, one.class_id) << ' ' << one.score << ' ' << one.box[0] << ' '
                << one.box[1] << ' ' << one.box[2] << ' ' << one.box[3] << '\n';
    }
  }
  odtrt_detector_close(detector);
}
